"""Fake quantization in one pass over memory: the rows of a matrix through the fused kernel.

What the kernels cannot do (ternary and binary grids, nf4, stochastic rounding, fp64, square blocks, groups that are not
contiguous in memory) takes the several passes of `arithmetic`; the numbers are the same, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_compress.ops import kernels
from ds_compress.quant.grid import ActivationGrid, Granularity, Grid, Levels, TokenGranularity, WeightGrid
from ds_compress.quant.layout import GROUP_AXIS, split_weight
from ds_compress.quant.qparams import QParams

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEVELS = (Levels.UNIFORM, Levels.FLOAT)


@dataclass(frozen=True)
class FakeQuantized:
    """`values`: Q(x) in the dtype and shape of x; `qparams`: those of each block; `unclipped`: packed bits (see
    `ops.bitmask`) of the elements that did not clip, None when not asked for."""

    values: torch.Tensor
    qparams: list[QParams]
    unclipped: torch.Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """A matrix of which each row, or each run of `block` columns of a row, has one scale; given ones hold for `height`
    rows."""

    values: torch.Tensor
    block: int
    height: int = 1

    @property
    def scales(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1] // self.block


def weight_rows(weight: torch.Tensor, grid: WeightGrid) -> Rows | None:
    """The weight as rows; None where the kernel does not apply."""
    if weight.dtype not in _DTYPES or grid.levels not in _LEVELS or grid.stochastic or not weight.numel():
        return None
    if grid.granularity is Granularity.PER_BLOCK:
        return _rows_of_squares(weight, grid)
    blocks = split_weight(weight.contiguous(), grid)
    if len(blocks) > 1 or blocks[0].shape[-1] != 1:
        return None
    group = blocks[0].shape[GROUP_AXIS]
    if grid.levels is Levels.FLOAT and grid.granularity is Granularity.PER_COLUMN_GROUP:
        columns = weight.shape[-1] if grid.stacked else weight.numel() // weight.shape[0]
        return Rows(weight.contiguous().view(-1, columns), group)
    return Rows(blocks[0].reshape(-1, group), group)


def _rows_of_squares(weight: torch.Tensor, grid: WeightGrid) -> Rows | None:
    """Rows in which a square is a run of columns of each of its rows; scales have to be given."""
    size = grid.group_size
    rows, columns = (
        weight.shape[-2:] if grid.stacked else (weight.shape[0], weight.numel() // weight.shape[0])
    )
    if grid.levels is not Levels.FLOAT or rows % size or columns % size:
        return None
    return Rows(weight.contiguous().view(-1, columns), size, height=size)


def input_rows(x: torch.Tensor, grid: ActivationGrid) -> Rows | None:
    """x as rows; None where the kernel does not apply."""
    if x.dtype not in _DTYPES or grid.levels not in _LEVELS or not x.numel():
        return None
    if grid.granularity is TokenGranularity.PER_SAMPLE:
        return Rows(x.reshape(x.shape[0], -1), x.numel() // x.shape[0])
    columns = x.shape[-1]
    in_groups = grid.granularity is TokenGranularity.PER_TOKEN_GROUP
    if in_groups and grid.levels is Levels.UNIFORM:
        return Rows(x.reshape(-1, grid.group_size), grid.group_size)
    if grid.granularity is TokenGranularity.PER_TENSOR:
        return (
            Rows(x.reshape(1, -1), x.numel())
            if grid.levels is Levels.FLOAT
            else Rows(x.reshape(-1, columns), columns)
        )
    return Rows(x.reshape(-1, columns), grid.group_size if in_groups else columns)


def fake_quantize_rows(
    rows: Rows,
    grid: Grid,
    qparams: QParams | None,
    with_unclipped: bool,
    global_scale: torch.Tensor | None = None,
) -> FakeQuantized:
    """Q of the rows, with qparams (fp32, one for each scale) chosen from them when none are given.

    global_scale: fp32 (1,), of grids that have one and when qparams are to be chosen.
    """
    known = grid.number_format
    if known is not None and known.number is not None:
        given = None if qparams is None else _given(qparams.scale, rows)
        values, scale, unclipped = kernels().fake_quantize_float(
            rows.values.contiguous(),
            given,
            global_scale if given is None and known.has_global_scale else None,
            exponent_bits=known.number.exponent_bits,
            mantissa_bits=known.number.mantissa_bits,
            largest=known.number.largest,
            scale_kind=int(known.scale),
            block=rows.block,
            with_mask=with_unclipped,
        )
        return FakeQuantized(values, [QParams(scale)], unclipped if with_unclipped else None)
    scale = offset = None
    if qparams is not None:
        scale = qparams.scale.reshape(-1)
        offset = None if qparams.offset is None else qparams.offset.reshape(-1)
    values, scale, offset, unclipped = kernels().fake_quantize(
        rows.values.contiguous(),
        scale,
        offset,
        quant_min=int(grid.quant_min),
        quant_max=int(grid.quant_max),
        steps=grid.scale_divisor,
        symmetric=grid.symmetric,
        with_mask=with_unclipped,
    )
    used = QParams(scale, None if grid.symmetric else offset)
    return FakeQuantized(values, [used], unclipped if with_unclipped else None)


def _given(scale: torch.Tensor, rows: Rows) -> torch.Tensor:
    if scale.numel() == 1:
        return scale.float().reshape(1, 1)
    down, across = rows.scales
    of_runs = scale.float().reshape(down // rows.height, across)
    return (of_runs if rows.height == 1 else of_runs.repeat_interleave(rows.height, 0)).contiguous()
