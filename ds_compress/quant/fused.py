"""Fake quantization in one pass over memory: the rows of a matrix through the fused kernel.

What the kernel cannot do (ternary and binary grids, stochastic rounding, fp64, groups that are not contiguous in
memory) takes the several passes of `arithmetic`; the numbers are the same, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_compress.ops import kernels
from ds_compress.quant.grid import ActivationGrid, Grid, Levels, TokenGranularity, WeightGrid
from ds_compress.quant.layout import GROUP_AXIS, split_weight
from ds_compress.quant.qparams import QParams

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FakeQuantized:
    """`values`: Q(x) in the dtype and shape of x; `qparams`: those of each block; `unclipped`: packed bits (see
    `ops.bitmask`) of the elements that did not clip, None when not asked for."""

    values: torch.Tensor
    qparams: list[QParams]
    unclipped: torch.Tensor | None = None


def weight_rows(weight: torch.Tensor, grid: WeightGrid) -> torch.Tensor | None:
    """The weight as `[groups, group]`, one scale each; None where the kernel does not apply."""
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
    """x as rows that share one scale; None where the kernel does not apply."""
    if x.dtype not in _DTYPES or not x.numel():
        return None
    if grid.granularity is TokenGranularity.PER_SAMPLE:
        return x.reshape(x.shape[0], -1)
    return x.reshape(-1, x.shape[-1])


def fake_quantize_rows(
    rows: torch.Tensor, grid: Grid, qparams: QParams | None, with_unclipped: bool
) -> FakeQuantized:
    """Q of a contiguous `[R, C]`, with qparams (fp32 `[R]`) chosen from each row when none are given."""
    scale = offset = None
    if qparams is not None:
        scale = qparams.scale.reshape(-1)
        offset = None if qparams.offset is None else qparams.offset.reshape(-1)
    values, scale, offset, unclipped = kernels().fake_quantize(
        rows.contiguous(),
        scale,
        offset,
        quant_min=grid.quant_min,
        quant_max=grid.quant_max,
        steps=grid.scale_divisor,
        symmetric=grid.symmetric,
        with_mask=with_unclipped,
    )
    used = QParams(scale, None if grid.symmetric else offset)
    return FakeQuantized(values, [used], unclipped if with_unclipped else None)
