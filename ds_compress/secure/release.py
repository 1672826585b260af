"""Which release a signed folder is, and that nobody hands out an older one: `release.json`, covered by the signature.

    {"format": 1, "name": "reviews-bert", "version": 1764325000}

A signature says who made a folder, not that it is the newest: an attacker who keeps an old, weaker release can hand it
out for the new one. Versions grow, and whoever verifies may remember the highest one in a file of their own (`seen`),
as The Update Framework does (Samuel et al., CCS 2010): a lower one is refused from then on.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from ds_compress.files import atomic_write
from ds_compress.secure.errors import TamperedError

FILE_NAME = "release.json"
_FORMAT = 1


@dataclass(frozen=True)
class Release:
    """name: of the model through all its releases. version: grows from one to the next."""

    name: str
    version: int

    def text(self) -> str:
        return json.dumps({"format": _FORMAT, "name": self.name, "version": self.version}) + "\n"

    @classmethod
    def parse(cls, content: bytes, path: Path) -> Release:
        """Raises TamperedError where it is not what `text` writes."""
        try:
            data = json.loads(content)
            name, version = data["name"], data["version"]
            if (
                data["format"] != _FORMAT
                or not isinstance(name, str)
                or type(version) is not int
                or version < 0
            ):
                raise ValueError("it has other keys or values than this version writes")
            return cls(name, version)
        except (ValueError, KeyError, TypeError) as error:
            raise TamperedError(f"{path} is no release that this version reads: {error}") from None


def now() -> int:
    """A version that grows by itself, wherever a release is signed: seconds since 1970."""
    return int(time.time())


def check(
    release: Release | None,
    folder: Path,
    *,
    name: str | None = None,
    min_version: int | None = None,
    seen: Path | None = None,
    signer: str = "",
) -> None:
    """Refuses a release of another name, or an older one than was asked for or seen.

    release: of a folder whose signature is good; None where the signer gave none. seen: see `remember`. signer: the
    fingerprint of the key.

    Raises:
        TamperedError: it is refused.
        ValueError: the file of seen versions is damaged: what it knew would be lost.
    """
    if release is None:
        if name is not None or min_version is not None or seen is not None:
            raise TamperedError(f"{folder} has no {FILE_NAME} that says its name and version: sign it again")
        return
    if name is not None and release.name != name:
        raise TamperedError(f"{folder} is a release of {release.name!r}, not of {name!r}")
    known = _read(seen).get(_entry(signer, release), -1) if seen is not None else -1
    least = max(known, -1 if min_version is None else min_version)
    if release.version < least:
        raise TamperedError(
            f"{folder} is version {release.version} of {release.name!r}, older than {least}: a rollback"
        )


def remember(release: Release, seen: Path, signer: str) -> None:
    """Keeps, in the JSON file `seen`, the highest version of this signer and name; only after all checks passed."""
    known = _read(seen)
    entry = _entry(signer, release)
    if release.version > known.get(entry, -1):
        atomic_write(seen, json.dumps({**known, entry: release.version}, indent=1, sort_keys=True) + "\n")


def _entry(signer: str, release: Release) -> str:
    return f"{signer[:16]} {release.name}"


def _read(seen: Path) -> dict[str, int]:
    if not seen.exists():
        return {}
    try:
        data = json.loads(seen.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not all(type(version) is int for version in data.values()):
            raise ValueError("it is no object of versions")
    except ValueError as error:
        raise ValueError(
            f"{seen}, the versions that were seen, is damaged: {error}; restore it, or delete it"
        ) from None
    return data
