"""Signatures of folders in OpenSSF's format (model-signing): `model.sig` beside the weights.

The signature is over the names and sha256 hashes of all files of the folder but itself. `model_signing verify key`
verifies ours, and `verify` those that `model_signing sign key` wrote, where the folder has no files of git, which that
command leaves out: here every file counts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_compress.files import atomic_write
from ds_compress.secure import keys, release
from ds_compress.secure.errors import KeyUnavailableError, SecurityError, TamperedError
from ds_compress.secure.memory import in_memory
from ds_compress.secure.release import Release

SIGNATURE = "model.sig"
_METHOD = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
_MOST_NAMED = 3


@dataclass(frozen=True)
class Signed:
    """What a good signature says of a folder.

    digests: sha256 of every file but the signature, by name with `/`. release: None where the signer gave none.
    signer: sha256 of the public key's PEM, which is no secret.
    """

    folder: Path
    digests: Mapping[str, str]
    release: Release | None
    signer: str

    def __str__(self) -> str:
        which = f"{self.release.name!r}, version {self.release.version}, " if self.release else ""
        return f"{self.folder}: {which}{len(self.digests)} files, signed by key {self.signer[:16]}"


def sign(
    folder: str | os.PathLike[str],
    key: str | os.PathLike[str],
    *,
    password: bytes | None = None,
    name: str | None = None,
    version: int | None = None,
) -> Path:
    """Writes `release.json` and `model.sig` into a folder; signs again where it is signed already.

    Args:
        key: path, `env:NAME` or PKCS#11 URI of a private key; see `secure.keys`.
        name: of the model through its releases; by default that of the release it is now, else the folder's.
        version: higher than the last one; by default the seconds since 1970.

    Returns:
        The signature's path.

    Raises:
        ValueError: the folder has a link or a special file, or `version` is lower than that of the release it is.
        KeyUnavailableError: the key is missing or locked.
    """
    root = _existing(folder)
    path = root / release.FILE_NAME
    before = Release.parse(path.read_bytes(), path) if path.exists() and not path.is_symlink() else None
    made = Release(
        name or (before.name if before else root.name), release.now() if version is None else version
    )
    if made.version < 0 or (
        before is not None and before.name == made.name and made.version < before.version
    ):
        least = max(0, before.version if before is not None else 0)
        raise ValueError(f"version {made.version} of {root} is lower than {least}: versions grow")
    signer = _signer(key, password)
    _refuse_links(root)
    atomic_write(path, made.text())
    return write_signature(root, signer)


def write_signature(root: Path, signer: Any) -> Path:
    """Signs a folder as it is. signer: `signing_config(...)`."""
    signature = root / SIGNATURE
    # Made before anything is written: a temporary file in the folder would be signed, too.
    with in_memory(b"") as path:
        signer.sign(root, path)
        content = Path(path).read_bytes()
    atomic_write(signature, content)
    return signature


def signing_config(key: str | os.PathLike[str], password: bytes | None = None) -> Any:
    """What signs with this key, for `write_signature`."""
    return _signer(key, password)


def verify(
    folder: str | os.PathLike[str],
    public_key: str | os.PathLike[str],
    *,
    name: str | None = None,
    min_version: int | None = None,
    seen: str | os.PathLike[str] | None = None,
) -> Signed:
    """Checks that a folder is, file by file, what the owner of `public_key` signed. Reads every file once.

    Args:
        public_key: path or `env:NAME`.
        name: of the model that it has to be.
        min_version: the lowest version that is accepted.
        seen: a JSON file of yours that remembers the highest version of each model; a lower one is refused.

    Raises:
        TamperedError: a file was changed, added or removed, is a link, or the signature is missing or somebody else's;
            or it is an older release.
        KeyUnavailableError: the public key is missing.
        FileNotFoundError: there is no such folder.
    """
    pem = keys.public_key(public_key)
    return verify_with(folder, pem, name=name, min_version=min_version, seen=seen)


def verify_with(
    folder: str | os.PathLike[str],
    public_pem: bytes,
    *,
    name: str | None = None,
    min_version: int | None = None,
    seen: str | os.PathLike[str] | None = None,
) -> Signed:
    """`verify` with the key itself, as `keys.public_key` returns it."""
    root = _existing(folder)
    signed = check_signature(_signature_of(root), public_pem, root)
    try:
        found = _digests_of(root)
    except (ValueError, OSError) as error:
        raise TamperedError(f"{root} is not as it was signed: {_printable(str(error))}") from None
    _compare(signed.digests, found, root)
    checked = Signed(root, signed.digests, release_of(root, signed.digests), signed.signer)
    record = None if seen is None else Path(seen)
    release.check(
        checked.release, root, name=name, min_version=min_version, seen=record, signer=signed.signer
    )
    if record is not None and checked.release is not None:
        release.remember(checked.release, record, signed.signer)
    return checked


def check_signature(content: bytes, public_pem: bytes, root: Path) -> Signed:
    """What a signature says, once it is known to be of this key; files are not looked at, the release neither.

    Raises:
        TamperedError: it is not.
    """
    verifying, hashing = keys.needed("model_signing.verifying"), keys.needed("model_signing.hashing")

    class Captured(hashing.Config):  # type: ignore[name-defined]
        """In the place of the folder: hands out what the library verified, and compares nothing."""

        manifest: Any = None

        def hash(self, *args: Any, **kwargs: Any) -> Any:
            return self

        def __eq__(self, verified: object) -> bool:
            self.manifest = verified
            return True

    captured = Captured()
    try:
        with in_memory(public_pem) as key, in_memory(content) as signature:
            config = verifying.Config().use_elliptic_key_verifier(public_key=key)
            config.set_hashing_config(captured).verify(root, signature)
        manifest = captured.manifest
        how = {k: v for k, v in manifest.serialization_type.items() if k != "ignore_paths"}
        digests = {item.identifier: item.digest.digest_hex for item in manifest.resource_descriptors()}
    except SecurityError:
        raise
    except Exception as error:  # a signature is anybody's bytes, and the library fails in many ways
        reason = _printable(str(error).partition("\n")[0][:200]) or "the signature is not of this key"
        raise TamperedError(f"{root / SIGNATURE} is not trusted: {reason}") from None
    if how != _METHOD:
        raise TamperedError(f"{root / SIGNATURE} is not trusted: it hashes by {how}, not by {_METHOD}")
    return Signed(root, digests, None, fingerprint(public_pem))


def fingerprint(public_pem: bytes) -> str:
    """sha256 of a public key's PEM, in hexadecimal: the key's name in signatures and messages."""
    return hashlib.sha256(public_pem).hexdigest()


def release_of(root: Path, digests: Mapping[str, str]) -> Release | None:
    """The release that a verified folder says it is.

    Raises:
        TamperedError: the file is not the signed one, or not ours.
    """
    if release.FILE_NAME not in digests:
        return None
    path = root / release.FILE_NAME
    return Release.parse(read_signed(root, release.FILE_NAME, digests), path)


def read_signed(root: Path, name: str, digests: Mapping[str, str]) -> bytes:
    """A file's bytes, which are the signed ones: read once, hashed as read, never through a link.

    Raises:
        TamperedError: they are not.
    """
    path = root / name
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(descriptor, "rb") as file:
            content = file.read()
    except OSError as error:
        raise TamperedError(f"{path} cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != digests.get(name):
        raise TamperedError(f"{path} was changed after it was signed")
    return content


def _signer(key: str | os.PathLike[str], password: bytes | None) -> Any:
    signing, uri = keys.needed("model_signing.signing"), keys.pkcs11_uri(key)
    if uri is not None:
        try:
            config = signing.Config().use_pkcs11_signer(pkcs11_uri=uri)
        except Exception as error:
            # Not the error's own words: a URI may hold a PIN.
            raise KeyUnavailableError(
                f"the PKCS#11 key cannot be used ({type(error).__name__}): it needs pip install "
                "'model-signing[pkcs11]', a module of the token, and its PIN"
            ) from None
    else:
        private = keys.private_key(key, password)
        serialization = keys.needed("cryptography.hazmat.primitives.serialization")
        plain = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with in_memory(plain) as path:
            config = signing.Config().use_elliptic_key_signer(private_key=path)
    return config.set_hashing_config(_hashing())


def _hashing() -> Any:
    """Every file but the signature, git's too; links are refused."""
    config = keys.needed("model_signing.hashing").Config()
    config.use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False)
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _digests_of(root: Path) -> dict[str, str]:
    manifest = _hashing().hash(root)
    return {item.identifier: item.digest.digest_hex for item in manifest.resource_descriptors()}


def _refuse_links(root: Path) -> None:
    """What the signer would refuse, before anything is written."""
    for path in root.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            kind = "symlink" if path.is_symlink() else "special file"
            raise ValueError(f"{path} is a {kind}, which no signature covers: replace it by what it leads to")


def _existing(folder: str | os.PathLike[str]) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder")
    # A link to the folder is the caller's own choice; those inside of it are refused.
    return root.resolve()


def _signature_of(root: Path) -> bytes:
    path = root / SIGNATURE
    if path.is_symlink() or not path.is_file():
        raise TamperedError(f"{root} is not signed: it has no {SIGNATURE}")
    return path.read_bytes()


def _compare(signed: Mapping[str, str], found: Mapping[str, str], root: Path) -> None:
    changed = [name for name in signed if name in found and signed[name] != found[name]]
    parts = {
        "changed": changed,
        "missing": [name for name in signed if name not in found],
        "added": [name for name in found if name not in signed],
    }
    words = "; ".join(f"{what}: {_some(sorted(names))}" for what, names in parts.items() if names)
    if words:
        raise TamperedError(f"{root} is not as it was signed: {words}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(_printable, names[:_MOST_NAMED])) + more


def _printable(text: str) -> str:
    """Attackers choose names of files and words of signatures: escape sequences and surrogates are for no terminal."""
    return text if text.isprintable() else ascii(text)
