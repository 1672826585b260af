"""Quantizing a whole weight: each block of `layout.split_weight` for itself, then put together again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_compress.ops.reference.float_formats import decode, encode
from ds_compress.quant.arithmetic import clamp_to_dtype, dequantize_, quantize_block, working_dtype
from ds_compress.quant.formats import nf4_codes, nf4_values
from ds_compress.quant.grid import Granularity, WeightGrid
from ds_compress.quant.layout import (
    GROUP_AXIS,
    join_scale,
    join_weight,
    largest_of_squares,
    per_matrix,
    split_scale,
    split_weight,
)
from ds_compress.quant.qparams import (
    QParams,
    choose_qparams,
    global_scale_for,
    mean_magnitude,
    qparams_from_range,
    stored_scale,
)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as stored: `values` (int8, uint8 when asymmetric, uint8 codes of floats) in its shape, fp32 `scale` and
    `offset` of `layout.scale_shape`, what values are multiplied by; fp32 `global_scale` (1,), or of a stack [matrices],
    of grids that have one."""

    values: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    grid: WeightGrid
    global_scale: torch.Tensor | None = None


def choose_weight_qparams(
    weight: torch.Tensor, grid: WeightGrid, global_scale: torch.Tensor | None = None
) -> list[QParams]:
    """QParams of each block of `layout.split_weight`, from its values; arithmetic in `working_dtype`.

    global_scale: of grids that have one, fp32 (1,), or one for each matrix of a stack; by default that of this weight.
    """
    if grid.has_global_scale and global_scale is None:
        global_scale = own_global_scale(weight, grid)
    if grid.granularity is Granularity.PER_BLOCK and grid.format != "int" and weight.numel():
        largest = largest_of_squares(weight.contiguous(), grid.group_size, grid.stacked)
        largest = largest.to(working_dtype(weight))
        return [qparams_from_range(largest.neg(), largest, grid)]
    exact = weight.to(working_dtype(weight)).contiguous()
    return [
        choose_qparams(block, (GROUP_AXIS,), grid, per_matrix(global_scale, block, grid))
        for block in split_weight(exact, grid)
    ]


def own_global_scale(weight: torch.Tensor, grid: WeightGrid) -> torch.Tensor | None:
    """fp32 (1,), from the largest magnitude of the weight, of a stack [matrices]; None for grids without."""
    if not grid.has_global_scale:
        return None
    return global_scale_for(largest_magnitude(weight.detach(), grid.stacked), grid)


def largest_magnitude(weight: torch.Tensor, stacked: bool = False) -> torch.Tensor:
    """(), or of a stack [matrices], in the dtype of the weight."""
    if stacked:
        rows = weight.flatten(1)
        return torch.maximum(rows.amax(1), rows.amin(1).neg())
    lowest, highest = weight.aminmax()
    return torch.maximum(highest, lowest.neg())


def learned_qparams(
    scale: torch.Tensor, shape: Sequence[int], grid: WeightGrid, global_scale: torch.Tensor | None = None
) -> list[QParams]:
    """QParams from given scales of `layout.scale_shape`: |scale|, at least 2^-126, as the format can store it."""
    exact = stored_scale(scale.to(working_dtype(scale)), grid, per_matrix(global_scale, scale, grid))
    return [QParams(scale=block) for block in split_scale(exact, shape, grid)]


def quantize_blocks(
    weight: torch.Tensor, qparams: list[QParams], grid: WeightGrid, noise: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The quantized values of each block, in floating point.

    noise: one number in [0, 1) per weight, in the weight's shape, for stochastic rounding.
    """
    exact = weight.to(working_dtype(weight)).contiguous()
    blocks = split_weight(exact, grid)
    noises = split_weight(noise, grid) if noise is not None else [None] * len(blocks)
    return [quantize_block(block, r, grid, n) for block, r, n in zip(blocks, qparams, noises, strict=True)]


def fake_quantize(
    weight: torch.Tensor,
    grid: WeightGrid,
    noise: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight quantized and dequantized, in its dtype and shape.

    Args:
        noise: see `quantize_blocks`.
        scale: given scales of `layout.scale_shape` (LSQ); by default chosen from the values.
        global_scale: of grids that have one; by default that of this weight.
    """
    qparams = _qparams(weight, grid, scale, global_scale)
    blocks = quantize_blocks(weight, qparams, grid, noise)
    dequantized = [dequantize_(block, q) for block, q in zip(blocks, qparams, strict=True)]
    return clamp_to_dtype(join_weight(dequantized, weight.shape, grid), weight.dtype).to(weight.dtype)


def quantize(
    weight: torch.Tensor,
    grid: WeightGrid,
    noise: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> QuantizedWeight:
    """The integers or codes behind `fake_quantize` of the same arguments. The values of a NaN group mean nothing."""
    global_scale = own_global_scale(weight, grid) if global_scale is None else global_scale
    qparams = _qparams(weight, grid, scale, global_scale)
    values = join_weight(quantize_blocks(weight, qparams, grid, noise), weight.shape, grid)
    offsets = [r.offset for r in qparams if r.offset is not None]
    return QuantizedWeight(
        values=to_codes(values.nan_to_num_(0.0), grid),
        scale=join_scale([r.scale for r in qparams], weight.shape, grid),
        offset=join_scale(offsets, weight.shape, grid) if offsets else None,
        grid=grid,
        global_scale=global_scale,
    )


def to_codes(quantized: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    """Quantized values in floating point as they are stored: whole numbers, or the codes of floats."""
    known = grid.number_format
    if known is None:
        return quantized.to(grid.quantized_dtype)
    codes = nf4_codes(quantized) if known.number is None else encode(quantized, known.number)
    return codes.to(grid.quantized_dtype)


def from_codes(codes: torch.Tensor, grid: WeightGrid, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The inverse of `to_codes`."""
    known = grid.number_format
    if known is None:
        return codes.to(dtype)
    return nf4_values(codes, dtype) if known.number is None else decode(codes, known.number).to(dtype)


def _qparams(
    weight: torch.Tensor, grid: WeightGrid, scale: torch.Tensor | None, global_scale: torch.Tensor | None
) -> list[QParams]:
    if scale is None:
        return choose_weight_qparams(weight, grid, global_scale)
    return learned_qparams(scale, weight.shape, grid, global_scale)


def dequantize(quantized: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """q * scale (+ offset) in the arithmetic of `fake_quantize`, cast to `dtype` last."""
    shape, grid = quantized.values.shape, quantized.grid
    scales = split_scale(quantized.scale, shape, grid)
    offsets: Sequence[torch.Tensor | None] = [None] * len(scales)
    if quantized.offset is not None:
        offsets = split_scale(quantized.offset, shape, grid)
    blocks = split_weight(from_codes(quantized.values, grid, quantized.scale.dtype), grid)
    qparams = [QParams(scale, offset) for scale, offset in zip(scales, offsets, strict=True)]
    dequantized = [dequantize_(block, q) for block, q in zip(blocks, qparams, strict=True)]
    return clamp_to_dtype(join_weight(dequantized, shape, grid), dtype).to(dtype)


def initial_scale(weight: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    """Where a learned scale of integers begins: 2 mean|w| / sqrt(quant_max) per group, fp32 of `layout.scale_shape`
    (Esser 2020, section 2.1). Floats, whose steps are not equal, begin with `search.searched_scale`."""
    exact = weight.detach().to(working_dtype(weight)).contiguous()
    means = [mean_magnitude(block, (GROUP_AXIS,)) for block in split_weight(exact, grid)]
    largest = torch.finfo(exact.dtype).max
    return (join_scale(means, weight.shape, grid) * (2 / math.sqrt(grid.quant_max))).clamp_max(largest)
