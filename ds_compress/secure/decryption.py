"""The way back from an encrypted folder to one on disk, where somebody wants that."""

from __future__ import annotations

import os
from pathlib import Path

from ds_compress.files import UnfinishedFolder
from ds_compress.secure import signing
from ds_compress.secure.contents import VerifiedFolder
from ds_compress.secure.encryption import new_folder


def decrypt(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    identity: str | os.PathLike[str],
    public_key: str | os.PathLike[str],
    *,
    password: bytes | None = None,
    name: str | None = None,
    min_version: int | None = None,
    seen: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the plaintext of an encrypted folder, with its signature: for those who want it on disk.

    Both signatures are verified, the ciphertext's first. Files are their owner's alone (mode 0600). `load_verified`
    needs no such copy.

    Args: as of `encrypt` and `signing.verify`.

    Raises:
        TamperedError: a signature is not good, or the plaintext is not what was signed.
        KeyUnavailableError: a key is missing or locked, or is none that this folder was encrypted to.
        ValueError: the folder is not encrypted.
        FileExistsError: `out` exists; with `overwrite`, it is no signed folder.
    """
    target = new_folder(out, folder, overwrite, signing.SIGNATURE)
    opened = VerifiedFolder(
        folder, public_key, identity, password=password, name=name, min_version=min_version, seen=seen
    )
    if not opened.is_encrypted:
        raise ValueError(f"{folder} is not encrypted: it is signed, and readable as it is")
    with UnfinishedFolder(target) as made:
        for file in opened.names:
            _write_private(made.path / file, opened.read(file))
        _write_private(made.path / signing.SIGNATURE, opened.plaintext_signature)
        made.finish()
    return target


def _write_private(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
