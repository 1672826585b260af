"""The fragments of a DeepSpeed engine as `Shards`, which is all that a technique sees of it."""

from __future__ import annotations

from typing import Any

from ds_compress.engine.zero import internals
from ds_compress.engine.zero.fragments import all_fragments, check_fragments
from ds_compress.sharding.layer_shards import LayerShards
from ds_compress.sharding.shards import Shards


def shards_of(engine: Any, check: bool = False, layer_shards: LayerShards | None = None) -> Shards:
    """All fragments of `engine`; with `check`, after comparing each master with its parameter. A collective.

    Raises:
        RuntimeError: a master that was found is not that of its parameter.
    """
    group = internals.data_parallel_group(engine)
    fragments = list(all_fragments(engine, group))
    if check:
        check_fragments([fragment for fragment in fragments if fragment.numel > 0])
    return Shards(fragments, group, engine.device, layer_shards)
