"""Which teacher it is, in a few bytes that are the same for any number of processes: a resumed run has the same one.

    sum over parameters and over every k-th element i of   hash(name) * (2 i + 1) * bits of the element   modulo 2^64

at most `_SAMPLES` elements of each parameter: another training changes nearly all. Shards add their own elements up.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import nn

from ds_compress.engine.zero import internals
from ds_compress.modelinfo.kinds import shape_of

_SAMPLES = 4096
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@torch.no_grad()
def identity(model: nn.Module) -> str:
    """Hexadecimal, the same in every process; a collective where the model is sharded."""
    total, group = torch.zeros((), dtype=torch.int64), None
    for name, parameter in model.named_parameters():
        numel = torch.Size(shape_of(parameter)).numel()
        stride = -(-numel // _SAMPLES)
        values, start = parameter.detach(), 0
        if internals.is_zero3_parameter(parameter):
            group = parameter.ds_process_group  # type: ignore[attr-defined]
            shard = parameter.ds_tensor  # type: ignore[attr-defined]
            start = shard.ds_numel * dist.get_rank(group)
            values = shard.data.flatten()[: max(0, numel - start)]
        first = -start % stride
        sampled = values.flatten()[first::stride].cpu()
        bits = sampled.view(_BITS[sampled.element_size()]).to(torch.int64)
        places = 2 * (start + first + stride * torch.arange(len(bits))) + 1
        total += _key(f"{name} {tuple(shape_of(parameter))}") * (bits * places).sum()
    if group is not None:
        device = internals.current_device()
        total = total.to(device)
        dist.all_reduce(total, group=group)
    return f"{int(total) % 2**64:016x}"


def _key(name: str) -> int:
    """An odd number of 63 bits."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1 | 1
