"""Blocks that are written and do nothing: the config looks as if the model were compressed, and it is not."""

from __future__ import annotations

from collections.abc import Iterator

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.errors import ROOT, dotted, listed


def idle_lines(config: CompressionConfig) -> Iterator[str]:
    """A line for each block whose `"enabled"` was forgotten or that keeps everything, and one if nothing is enabled.

    A block that says `"enabled": false` is off because somebody wanted it.
    """
    blocks = config.blocks()
    for name, block in blocks.items():
        if not block.is_enabled and not block.says_enabled:
            where = dotted(name, *block.where_enabled)
            yield f'{dotted(name)} is written but not enabled, so it does nothing: add "enabled": true to {where}'
        elif block.is_enabled and block.keeps_everything:
            yield f"{dotted(name)} has a dense_ratio of 1 everywhere, so it removes nothing"
    if not config.enabled_blocks():
        idle = "but security is in it" if config.security is not None else "is in it"
        what = f"of {listed(blocks, 'and')} is enabled" if blocks else idle
        yield f"{ROOT} does nothing: nothing {what}, and the model trains uncompressed"
