"""Blocks that are written and do nothing: the config looks as if the model were compressed, and it is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.config.schema.placement import BLOCKS
from ds_compress.errors import ROOT, dotted, listed


def idle_lines(config: CompressionConfig, block: Mapping[str, Any]) -> Iterator[str]:
    """A line for each block whose `"enabled"` was forgotten or that keeps everything, and one if nothing is enabled.

    `block`: what `config` was parsed from. A block that says `"enabled": false` is off because somebody wanted it.
    """
    enabled = [name for name in BLOCKS if is_enabled(config, name)]
    for name in BLOCKS:
        if getattr(config, name) is None:
            continue
        if name not in enabled and not _says_enabled(block.get(name)):
            where = _home(config, name)
            yield f'{dotted(name)} is written but not enabled, so it does nothing: add "enabled": true to {where}'
        elif name in enabled and _keeps_everything(config, name):
            yield f"{dotted(name)} has a dense_ratio of 1 everywhere, so it removes nothing"
    if not enabled:
        written = [name for name in BLOCKS if getattr(config, name) is not None]
        what = f"of {listed(written, 'and')} is enabled" if written else "is in it"
        yield f"{ROOT} does nothing: nothing {what}, and the model trains uncompressed"


def is_enabled(config: CompressionConfig, name: str) -> bool:
    """Whether the block `name` is there and does something."""
    block = getattr(config, name)
    if block is None:
        return False
    settings = getattr(block, "shared", None) or getattr(block, "shared_parameters", block)
    return bool(settings.enabled)


def _says_enabled(written: Any) -> bool:
    if not isinstance(written, Mapping):
        return False
    shared = written.get("shared_parameters")
    return "enabled" in written or (isinstance(shared, Mapping) and "enabled" in shared)


def _home(config: CompressionConfig, name: str) -> str:
    block = getattr(config, name)
    return dotted(name, "shared_parameters") if hasattr(block, "shared_parameters") else dotted(name)


def _keeps_everything(config: CompressionConfig, name: str) -> bool:
    groups = getattr(getattr(config, name), "groups", {})
    ratios = [getattr(group.params, "dense_ratio", None) for group in groups.values()]
    return bool(ratios) and all(ratio == 1 for ratio in ratios)
