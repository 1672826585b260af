"""The JSON block: its schema, its errors, and what it means for a given model."""

from __future__ import annotations

from ds_compress.config.errors import ConfigError, Problem
from ds_compress.config.schema import CompressionConfig, parse_config

__all__ = ["CompressionConfig", "ConfigError", "Problem", "parse_config"]
