"""Layers of which each process of a tensor-parallel group holds a shard, in the coordinates of the full weight.

A sharded weight counts its elements shard by shard: the elements of process r of the group follow those of the
processes before it. Split by rows that is the usual order; split by columns it is another one, which shows only where
scores tie exactly. Scores compare elements, so a selection reduces over all processes that hold parts: the
tensor-parallel group, and the data-parallel ones too where ZeRO shards the masters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from ds_compress.sharding.fragment import Fragment


@dataclass(frozen=True)
class LayerShards:
    """The group of this process, and where its shard of each sharded parameter begins.

    places: {name: (start, numel of the full weight)}.
    """

    group: Any
    places: Mapping[str, tuple[int, int]]

    def start_of(self, name: str) -> int:
        """Where the shard of the parameter begins in the full weight; 0 for one that is not sharded."""
        return self.places.get(name, (0, 0))[0]

    def place(self, fragment: Fragment) -> Fragment:
        """The fragment of a shard, in the coordinates of the full weight."""
        start = self.start_of(fragment.name)
        return replace(fragment, start=fragment.start + start) if start else fragment

    def shard_group(self, is_sharded_over_data: bool) -> Any:
        """The processes that together hold each element of each weight once."""
        return dist.group.WORLD if is_sharded_over_data else self.group
