"""Signed and encrypted models: who made a folder, that nobody changed it, and who may read it.

    generate(out)                                new keys
    sign(folder, key)                            `release.json` and `model.sig` beside the weights
    verify(folder, public_key)                   or TamperedError
    encrypt(folder, out, recipients, key)        weights as age files, signed inside and outside
    decrypt(folder, out, identity, public_key)   back to disk
    load_verified(folder, public_key, identity)  the model, without plaintext on disk
    VerifiedFolder(folder, public_key)           its files, in memory

Cryptography is that of `model-signing` (OpenSSF), `cryptography` and `pyrage` (age): pip install 'ds_compress[secure]'.
"""

from __future__ import annotations

from ds_compress.secure.contents import VerifiedFolder
from ds_compress.secure.decryption import decrypt
from ds_compress.secure.encryption import encrypt
from ds_compress.secure.errors import KeyUnavailableError, SecurityError, TamperedError
from ds_compress.secure.keys import generate
from ds_compress.secure.load import load_verified
from ds_compress.secure.release import Release
from ds_compress.secure.signing import Signed, sign, verify

__all__ = [
    "KeyUnavailableError",
    "Release",
    "SecurityError",
    "Signed",
    "TamperedError",
    "VerifiedFolder",
    "decrypt",
    "encrypt",
    "generate",
    "load_verified",
    "sign",
    "verify",
]
