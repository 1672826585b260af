"""Fake quantization in one pass over memory: the rows of a matrix through the fused kernel.

What the kernel cannot do (ternary and binary codes, stochastic rounding, fp64, groups that are not runs of
memory) takes the several passes of `grid`; the numbers are the same, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_compress.ops import kernels
from ds_compress.quant.grid import ActivationGrid, Grid, Levels, Ranges, TokenGranularity, WeightGrid
from ds_compress.quant.layout import GROUP_AXIS, split_weight

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FakeQuantized:
    """`values`: Q(x) in the dtype and shape of x; `ranges`: what its codes mean, a block each;
    `kept`: packed bits (see `select.bitmask`) of the elements that did not clip, None when not asked for."""

    values: torch.Tensor
    ranges: list[Ranges]
    kept: torch.Tensor | None = None


def weight_rows(weight: torch.Tensor, grid: WeightGrid) -> torch.Tensor | None:
    """The weight as `[groups, group]`, a scale each; None where the kernel does not serve."""
    if (
        weight.dtype not in _DTYPES
        or grid.levels is not Levels.UNIFORM
        or grid.stochastic
        or not weight.numel()
    ):
        return None
    blocks = split_weight(weight.contiguous(), grid)
    if len(blocks) > 1 or blocks[0].shape[-1] != 1:
        return None
    return blocks[0].reshape(-1, blocks[0].shape[GROUP_AXIS])


def input_rows(x: torch.Tensor, grid: ActivationGrid) -> torch.Tensor | None:
    """x as rows that share one range; None where the kernel does not serve."""
    if x.dtype not in _DTYPES or not x.numel():
        return None
    if grid.granularity is TokenGranularity.PER_SAMPLE:
        return x.reshape(x.shape[0], -1)
    return x.reshape(-1, x.shape[-1])


def fake_quantize_rows(rows: torch.Tensor, grid: Grid, ranges: Ranges | None, keep: bool) -> FakeQuantized:
    """Q of a contiguous `[R, C]`, with measured ranges (fp32 `[R]`) when none are given."""
    scale = offset = None
    if ranges is not None:
        scale = ranges.scale.reshape(-1)
        offset = None if ranges.offset is None else ranges.offset.reshape(-1)
    values, scale, offset, kept = kernels().fake_quantize(
        rows.contiguous(),
        scale,
        offset,
        quant_min=grid.low,
        quant_max=grid.high,
        steps=grid.steps,
        symmetric=grid.symmetric,
        with_mask=keep,
    )
    return FakeQuantized(values, [Ranges(scale, None if grid.symmetric else offset)], kept if keep else None)
