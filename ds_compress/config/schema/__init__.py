"""The JSON block: one file per block of it, one model of all, one error for everything that is wrong."""

from __future__ import annotations

from ds_compress.config.schema.compression_training import CompressionConfig, parse_config

__all__ = ["CompressionConfig", "parse_config"]
