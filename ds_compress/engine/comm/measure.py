"""DeepSpeed's way of sending gradients or weights against ours, timed on the link that a run has."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ds_compress.engine.zero import internals
from ds_compress.reduce import bandwidth
from ds_compress.reduce.codec import BlockCodec
from ds_compress.reduce.exchange import QuantizedSum
from ds_compress.reduce.slices import Segment
from ds_compress.reduce.weight_deltas import ReplicatedWeights


def compare_reductions(engine: Any, quantized: QuantizedSum) -> bandwidth.Comparison:
    """Times one reduction of the engine's kind, plain and quantized."""
    wrapper, group, device = engine.optimizer, quantized.group, torch.device(engine.device)
    dtype = engine.communication_data_type
    flat = _probe(bandwidth.PROBE_ELEMENTS, device, dtype)
    size = dist.get_world_size(group)
    scatters = internals.is_zero3(wrapper) or (internals.is_zero12(wrapper) and wrapper.reduce_scatter)

    def plain() -> None:
        if internals.is_zero3(wrapper):
            chunk = flat[: flat.numel() // size * size]
            dist.reduce_scatter_tensor(torch.empty_like(chunk[: chunk.numel() // size]), chunk, group=group)
        else:
            dist.all_reduce(flat, group=group)

    def ours() -> None:
        if scatters:
            segments = [Segment(values, owner) for owner, values in enumerate(flat.tensor_split(size))]
            quantized.reduce_scatter(segments, lambda part, values: None, 1 / size)
        else:
            quantized.all_reduce([Segment(flat, 0)], 1 / size)

    sent = 2 * (size - 1) * flat.nbytes // size
    return bandwidth.compare(plain, ours, group, device, sent)


def compare_all_gathers(engine: Any, codec: BlockCodec) -> bandwidth.Comparison:
    """Times an all-gather of 16-bit (or fp32) weights, plain and quantized."""
    group = internals.data_parallel_group(engine)
    device, size = torch.device(engine.device), dist.get_world_size(group)
    dtype = next(p.dtype for p in engine.module.parameters() if p.requires_grad)
    shard = _probe(bandwidth.PROBE_ELEMENTS // size, device, dtype)
    whole = torch.empty(shard.numel() * size, dtype=dtype, device=device)
    copies = ReplicatedWeights(torch.zeros_like(whole), group, codec)
    return bandwidth.compare(
        lambda: dist.all_gather_into_tensor(whole, shard, group=group),
        lambda: copies.update(shard.float()),
        group,
        device,
        (size - 1) * shard.nbytes,
    )


def _probe(numel: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Random values; torch's own generators, which the training draws from, are where they were."""
    return torch.randn(numel, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
