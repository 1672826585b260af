"""The command `ds_compress`: export, inspect, plan."""

from __future__ import annotations

from ds_compress.cli.app import app

__all__ = ["app"]
