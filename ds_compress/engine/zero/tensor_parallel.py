"""AutoTP training: the processes of a tensor-parallel group hold different shards of a layer's weight.

AutoTP replaces modules and keeps the names of their parameters, so what a block means is worked out on the full model
before, and masks need nothing but fragments (see `sharding.layer_shards`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_compress.engine.zero import internals
from ds_compress.sharding.layer_shards import LayerShards


def layer_shards(engine: Any) -> LayerShards | None:
    """Where this process' shards of the layers of `engine` lie; None without AutoTP. A collective otherwise."""
    group = internals.tensor_parallel_group(engine)
    if group is None:
        return None
    own = {
        name: _numel(parameter)
        for name, parameter in engine.module.named_parameters()
        if internals.is_tensor_parallel_shard(parameter)
    }
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    rank = dist.get_rank(group)
    before = {name: sum(numels[name] for numels in everyone[:rank]) for name in own}
    return LayerShards(
        group, {name: (before[name], sum(numels[name] for numels in everyone)) for name in own}
    )


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def any_in_group(flag: bool, group: Any, device: torch.device) -> bool:
    """Whether `flag` is set in any process of the group."""
    told = torch.tensor(int(flag), device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX, group=group)
    return bool(told.item())
