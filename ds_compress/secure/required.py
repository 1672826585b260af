"""What the JSON's `security` demands of a folder before anything of it is read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ds_compress.secure import keys, signing
from ds_compress.secure.errors import TamperedError

if TYPE_CHECKING:
    from torch import nn

    from ds_compress.config.schema.compression_training import CompressionConfig

_SIGNER = "_ds_compress_signer"


def requires_signatures(config: CompressionConfig) -> bool:
    """Whether the JSON says `"security": {"verify": "require"}`."""
    return config.security is not None and config.security.verify == "require"


def trusts_pickle(config: CompressionConfig) -> bool:
    """Whether the JSON says `"security": {"trust_pickle": true}`: pickles may name whatever they like."""
    return config.security is not None and config.security.trust_pickle


def require(folder: str | os.PathLike[str], config: CompressionConfig) -> signing.Signed | None:
    """Refuses a folder that is not signed as the JSON's `security` demands; None where it demands nothing.

    Raises:
        SecurityError: it is not, or the key is missing.
    """
    if not requires_signatures(config):
        return None
    assert config.security is not None and config.security.public_key is not None
    try:
        return signing.verify(folder, config.security.public_key)
    except FileNotFoundError as error:
        raise TamperedError(f"{error}: security.verify wants a signed folder") from None


def mark(model: nn.Module, signed: signing.Signed) -> None:
    """Notes on a model who signed the folder that it was loaded from."""
    model.__dict__[_SIGNER] = signed.signer


def require_object(model: nn.Module, config: CompressionConfig) -> None:
    """Refuses a model that somebody made, where `security` demands signatures, unless `load_verified` made it.

    Raises:
        SecurityError: it was loaded otherwise, or the folder was signed by another key.
    """
    if not requires_signatures(config):
        return
    assert config.security is not None and config.security.public_key is not None
    signer = vars(model).get(_SIGNER)
    if signer is None:
        raise TamperedError(
            f"nobody verified this {type(model).__name__}: load it with ds_compress.load_verified"
        )
    if signer != signing.fingerprint(keys.public_key(config.security.public_key)):
        raise TamperedError(f"this {type(model).__name__} was signed by another key")
