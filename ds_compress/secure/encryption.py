"""Encrypted folders: weights as age files (https://age-encryption.org/v1), signed inside and outside.

    model.safetensors.age    and every other file that is not text, each for all recipients
    config.json, ...         text stays readable: *.json, *.jinja, *.md, *.txt
    plaintext.sig            the signature of the folder as it was before: of the plaintext
    model.sig                the signature of what lies here: of the ciphertext

age authenticates that a file is whole, not who made it: anybody can encrypt to a public key. So the ciphertext is
signed too, and verified before a byte of it is decrypted; and the plaintext's signature holds what comes out to what
went in.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ds_compress.files import UnfinishedFolder
from ds_compress.secure import keys, signing
from ds_compress.secure.errors import TamperedError

ENCRYPTED = ".age"
PLAINTEXT_SIGNATURE = "plaintext.sig"
_READABLE = (".json", ".jinja", ".md", ".txt")


def encrypt(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipients: Sequence[str | os.PathLike[str]],
    key: str | os.PathLike[str],
    *,
    password: bytes | None = None,
    public_key: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the encrypted, signed copy of a signed folder. No plaintext is written anywhere.

    Args:
        folder: signed with `key`.
        out: appears when complete.
        recipients: age1... keys, paths or `env:NAME`; each one's identity decrypts.
        key: that signs the ciphertext; see `secure.keys`.
        public_key: of `key`; only a PKCS#11 key needs it said.
        overwrite: replace `out`, which has to be an encrypted folder.

    Raises:
        TamperedError: the folder is unsigned, changed, or signed by another key.
        ValueError: it is encrypted already, or there is no recipient, or `out` is inside of it.
        FileExistsError: `out` exists, or is none that may be replaced.
    """
    pyrage = keys.needed("pyrage")
    if not recipients:
        raise ValueError("encrypt: there is no recipient, so nobody could read the result")
    to = [keys.recipient(source) for source in recipients]
    target = new_folder(out, folder, overwrite, PLAINTEXT_SIGNATURE)
    signer = signing.signing_config(key, password)
    signed = signing.verify_with(folder, _public_key_of(key, password, public_key))
    if PLAINTEXT_SIGNATURE in signed.digests or any(name.endswith(ENCRYPTED) for name in signed.digests):
        raise ValueError(f"{signed.folder} is encrypted already")
    with UnfinishedFolder(target) as made:
        for name, digest in signed.digests.items():
            path = made.path / (name if is_readable(name) else name + ENCRYPTED)
            path.parent.mkdir(parents=True, exist_ok=True)
            if is_readable(name):
                path.write_bytes(signing.read_signed(signed.folder, name, signed.digests))
                continue
            with open(signed.folder / name, "rb") as plain, open(path, "wb") as cipher:
                hashed = _Hashed(plain)
                pyrage.encrypt_io(hashed, cipher, to)
            if hashed.digest != digest:
                raise TamperedError(f"{signed.folder / name} was changed after it was signed")
        signature = (signed.folder / signing.SIGNATURE).read_bytes()
        (made.path / PLAINTEXT_SIGNATURE).write_bytes(signature)
        signing.write_signature(made.path, signer)
        made.finish()
    return target


def is_readable(name: str) -> bool:
    """Whether a file of this name is left readable by `encrypt`. What is not known to be text is not."""
    return name.lower().endswith(_READABLE)


def _public_key_of(
    key: str | os.PathLike[str], password: bytes | None, given: str | os.PathLike[str] | None
) -> bytes:
    if given is not None:
        return keys.public_key(given)
    if keys.pkcs11_uri(key) is not None:
        raise ValueError("encrypt: give the public key of the PKCS#11 key, too")
    return keys.public_pem(keys.private_key(key, password).public_key())


def new_folder(
    out: str | os.PathLike[str], source: str | os.PathLike[str], overwrite: bool, mark: str
) -> Path:
    """`out`, for what is made of the folder `source`. mark: a file of those folders that may be replaced.

    Raises:
        FileExistsError: it is there and not to be replaced, or nothing that this library wrote.
        ValueError: one of the two is inside of the other.
    """
    target = Path(out)
    one, other = target.resolve(), Path(source).resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise ValueError(
            f"{target} and {source} are one folder, or one is inside of the other: choose another"
        )
    if os.path.lexists(target):
        if not overwrite:
            raise FileExistsError(f"{target} exists: choose another folder, or overwrite it")
        if target.is_symlink() or not (target / mark).is_file():
            raise FileExistsError(f"{target} has no {mark}, so it is not replaced: choose another folder")
    return target


class _Hashed(io.RawIOBase):
    """A file that is hashed as it is read, once and to its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._hash.update(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)
