"""Where the JSON's `security` is asked: before a teacher or a teacher cache is read.

Checkpoints: `engine.checkpoint.signatures`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.errors import ConfigError, Problem, dotted, shown
from ds_compress.secure import required
from ds_compress.secure.encryption import PLAINTEXT_SIGNATURE
from ds_compress.secure.errors import SecurityError


def refuse_unsigned(folder: str, config: CompressionConfig, *keys: str) -> None:
    """A folder that the JSON names at `keys` is signed as `security` demands; every process looks for itself.

    Raises:
        ConfigError: it is not.
    """
    try:
        required.require(folder, config)
    except SecurityError as error:
        allowed = f"a folder that the owner of security.public_key has signed ({error})"
        raise ConfigError([Problem(dotted(*keys), shown(folder), allowed)]) from error


def refuse_unsigned_object(model: nn.Module, config: CompressionConfig, *keys: str) -> None:
    """As `refuse_unsigned`, for a model that was passed as an object: `load_verified` has to have loaded it.

    Raises:
        ConfigError: it has not.
    """
    try:
        required.require_object(model, config)
    except SecurityError as error:
        got = f"an object of {type(model).__name__}"
        raise ConfigError([Problem(dotted(*keys), got, f"a verified model ({error})")]) from error


def refuse_encrypted(folder: str, *keys: str) -> None:
    """A folder that a library of others is about to read is not encrypted.

    Raises:
        ConfigError: it is; with the way to use it.
    """
    if (Path(folder) / PLAINTEXT_SIGNATURE).exists():
        hint = "ds_compress.initialize(..., teacher=ds_compress.load_verified(folder, public_key, identity))"
        raise ConfigError(
            [
                Problem(
                    dotted(*keys), shown(folder), "a folder that is not encrypted", f"pass an object: {hint}"
                )
            ]
        )
