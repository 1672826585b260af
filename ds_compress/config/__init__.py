"""The JSON block: its schema, its errors, and what it means for a given model."""

from __future__ import annotations

from ds_compress.config.schema.compression_training import CompressionConfig, parse_config
from ds_compress.errors import ConfigError, Problem

__all__ = ["CompressionConfig", "ConfigError", "Problem", "parse_config"]
