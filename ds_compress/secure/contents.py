"""The files of a signed folder, in memory: each is read once, and what was hashed is what is used.

Whoever verifies a folder and then opens its files again trusts that nobody changed them in between. Here the bytes that
a caller gets are those whose hash was compared.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from ds_compress.secure import keys, signing
from ds_compress.secure.encryption import ENCRYPTED, PLAINTEXT_SIGNATURE, is_readable
from ds_compress.secure.errors import KeyUnavailableError, TamperedError


class VerifiedFolder:
    """Reads a folder that is signed, and decrypts what is encrypted in it, to memory only.

    Args: as of `signing.verify`; identity: of an encrypted folder; password: of the identity.

    Attributes:
        signed: what the signature said.
        names: of all files, as they are called in plaintext, without the signatures.
        is_encrypted: whether the folder on disk is.

    Raises:
        TamperedError: see `signing.verify`; or the plaintext's signature does not fit the folder.
        KeyUnavailableError: a key is missing; an encrypted folder needs an identity.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        public_key: str | os.PathLike[str],
        identity: str | os.PathLike[str] | None = None,
        *,
        password: bytes | None = None,
        name: str | None = None,
        min_version: int | None = None,
        seen: str | os.PathLike[str] | None = None,
    ) -> None:
        pem = keys.public_key(public_key)
        self.signed = signing.verify_with(folder, pem, name=name, min_version=min_version, seen=seen)
        self.is_encrypted = PLAINTEXT_SIGNATURE in self.signed.digests
        self._plain = dict(self.signed.digests)
        self._identity: Any = None
        if self.is_encrypted:
            if identity is None:
                raise KeyUnavailableError(
                    f"{self.signed.folder} is encrypted: give the identity that reads it"
                )
            self._identity = keys.identity(identity, password)
            self.plaintext_signature = self._stored(PLAINTEXT_SIGNATURE)
            inner = signing.check_signature(self.plaintext_signature, pem, self.signed.folder)
            self._plain = dict(inner.digests)
            self._compare()
        self.names = tuple(self._plain)

    def read(self, name: str) -> bytes:
        """A file's plaintext.

        Raises:
            TamperedError: it is not what was signed.
            KeyUnavailableError: it is encrypted, and not to this identity.
            FileNotFoundError: there is no such file.
        """
        if name not in self._plain:
            raise FileNotFoundError(f"{self.signed.folder} has no {name}")
        stored = name if name in self.signed.digests else name + ENCRYPTED
        content = self._stored(stored)
        if stored == name:
            return content
        try:
            plain: bytes = keys.needed("pyrage").decrypt(content, [self._identity])
        except Exception:
            # The ciphertext is what was signed, so it is the key that does not fit.
            raise KeyUnavailableError(
                f"{self.signed.folder / stored} is not encrypted to this identity"
            ) from None
        if hashlib.sha256(plain).hexdigest() != self._plain[name]:
            raise TamperedError(f"{self.signed.folder / stored} holds another plaintext than was signed")
        return plain

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder.

        Raises:
            ValueError: it is none.
        """
        found = json.loads(self.read(name))
        if not isinstance(found, dict):
            raise ValueError(f"{self.signed.folder / name} holds no object")
        return found

    def _stored(self, name: str) -> bytes:
        return signing.read_signed(self.signed.folder, name, self.signed.digests)

    def _compare(self) -> None:
        """The encrypted folder has the files of the plaintext, no more and no fewer, and the same readable ones."""
        here = dict(self.signed.digests)
        del here[PLAINTEXT_SIGNATURE]
        for name, digest in self._plain.items():
            stored = name if is_readable(name) else name + ENCRYPTED
            if stored not in here or (stored == name and here[name] != digest):
                raise TamperedError(
                    f"{self.signed.folder / stored} is not of the plaintext that {PLAINTEXT_SIGNATURE} signs"
                )
            del here[stored]
        if here:
            raise TamperedError(f"{self.signed.folder} has files beside the signed plaintext: {min(here)}")
