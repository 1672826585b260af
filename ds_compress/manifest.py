"""What a folder holds, written into it: sizes and hashes of all files. Damage is found before anything is read.

    <folder>/ds_compress_manifest.json
    {"format": 1, "about": {...}, "files": {name: [bytes, XXH3-128 as hex]}, "hash": of all the rest}

This finds accidents (a full disk, a lost write, a file of another step). It withstands nobody who rewrites both: that
is what signatures are for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ds_compress.files import atomic_write, inside

FILE_NAME = "ds_compress_manifest.json"
_CHUNK_BYTES = 1 << 22

Entry = tuple[int, str]
"""Bytes of a file, and its hash."""


class ManifestError(ValueError):
    """The manifest itself is damaged, or of a newer version; the message names it."""


@dataclass(frozen=True)
class Manifest:
    """about: whatever its writer wants to find again. files: by the name relative to the folder, with "/"."""

    about: dict[str, Any]
    files: dict[str, Entry]

    @classmethod
    def of(cls, folder: Path, about: Mapping[str, Any], known: Mapping[str, Entry] | None = None) -> Manifest:
        """Of all files in the folder. known: hashes that are known already, by name; the other files are read."""
        known = known or {}
        names = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and path.name != FILE_NAME
        )
        return cls(dict(about), {name: known.get(name) or entry_of(folder / name) for name in names})

    def write(self, folder: Path) -> None:
        """Appears only when complete, and is on the disk when this returns."""
        content = {"format": 1, "about": self.about, "files": self.files}
        content["hash"] = _hash_of(content)
        atomic_write(folder / FILE_NAME, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """None where the folder has none.

        Raises:
            ManifestError: it is damaged, or of a newer version.
        """
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content.get("format"), int) and content["format"] > 1:
                raise ManifestError(f"{path} was written by a newer version of ds_compress")
            if content.pop("hash") != _hash_of(content):
                raise ValueError("its content is not what was written")
            files = {name: (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
            for name in files:
                inside(folder, name)
            return cls(dict(content["about"]), files)
        except FileNotFoundError:
            return None
        except ManifestError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ManifestError(f"{path} is damaged: {error}") from error

    def problems(self, folder: Path, part: int = 0, parts: int = 1) -> list[str]:
        """What is wrong with the files, each in a few words that name the file; empty when all are as written.

        part, parts: only this share of the files, for several processes that check one folder together. Sizes are
        looked at first; a file is read only when its size is right. Files that the manifest does not know are let be.
        """
        names = list(self.files)[part::parts]
        found = [words for name in names if (words := _problem(folder / name, self.files[name]))]
        if len(found) > 1 and 2 * len(found) > len(names):
            found.insert(0, f"{folder / FILE_NAME} is of another folder, or most files are")
        return found


def entry_of(path: Path) -> Entry:
    """Size and hash of a file as it is now."""
    digest, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return size, digest.hexdigest()


def _problem(path: Path, entry: Entry) -> str:
    size, digest = entry
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path} has {found} bytes instead of {size}"
        if entry_of(path)[1] != digest:
            return f"{path} was changed: its hash is not that of what was written"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return ""


def _hash_of(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
