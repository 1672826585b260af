"""Quantizing a whole weight: each block of `layout.split_weight` for itself, then put together again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_compress.ops.reference.fake_quantize import SMALLEST_SCALE
from ds_compress.quant.arithmetic import clamp_to_dtype, dequantize_, quantize_block, working_dtype
from ds_compress.quant.grid import WeightGrid
from ds_compress.quant.layout import GROUP_AXIS, join_scale, join_weight, split_scale, split_weight
from ds_compress.quant.qparams import QParams, choose_qparams, mean_magnitude


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers: `values` (int8, uint8 when asymmetric) in its shape, fp32 `scale` and `offset` of
    `layout.scale_shape`."""

    values: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    grid: WeightGrid


def choose_weight_qparams(weight: torch.Tensor, grid: WeightGrid) -> list[QParams]:
    """QParams of each block of `layout.split_weight`, from its values; arithmetic in `working_dtype`."""
    exact = weight.to(working_dtype(weight)).contiguous()
    return [choose_qparams(block, (GROUP_AXIS,), grid) for block in split_weight(exact, grid)]


def learned_qparams(scale: torch.Tensor, shape: Sequence[int], grid: WeightGrid) -> list[QParams]:
    """QParams from given scales of `layout.scale_shape`: |scale|, and at least 2^-126."""
    exact = scale.to(working_dtype(scale)).abs().clamp_min(SMALLEST_SCALE)
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
) -> torch.Tensor:
    """The weight quantized and dequantized, in its dtype and shape.

    noise: see `quantize_blocks`. scale: given scales of `layout.scale_shape` (LSQ); by default chosen from the values.
    """
    qparams = (
        choose_weight_qparams(weight, grid) if scale is None else learned_qparams(scale, weight.shape, grid)
    )
    blocks = quantize_blocks(weight, qparams, grid, noise)
    dequantized = [dequantize_(block, q) for block, q in zip(blocks, qparams, strict=True)]
    return clamp_to_dtype(join_weight(dequantized, weight.shape, grid), weight.dtype).to(weight.dtype)


def quantize(
    weight: torch.Tensor,
    grid: WeightGrid,
    noise: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> QuantizedWeight:
    """The integers behind `fake_quantize` of the same arguments. The values of a NaN group mean nothing."""
    qparams = (
        choose_weight_qparams(weight, grid) if scale is None else learned_qparams(scale, weight.shape, grid)
    )
    values = join_weight(quantize_blocks(weight, qparams, grid, noise), weight.shape, grid)
    offsets = [r.offset for r in qparams if r.offset is not None]
    return QuantizedWeight(
        values=values.nan_to_num_(0.0).to(grid.quantized_dtype),
        scale=join_scale([r.scale for r in qparams], weight.shape, grid),
        offset=join_scale(offsets, weight.shape, grid) if offsets else None,
        grid=grid,
    )


def dequantize(quantized: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """q * scale (+ offset) in the arithmetic of `fake_quantize`, cast to `dtype` last."""
    shape, grid = quantized.values.shape, quantized.grid
    scales = split_scale(quantized.scale, shape, grid)
    offsets: Sequence[torch.Tensor | None] = [None] * len(scales)
    if quantized.offset is not None:
        offsets = split_scale(quantized.offset, shape, grid)
    blocks = split_weight(quantized.values.to(quantized.scale.dtype), grid)
    qparams = [QParams(scale, offset) for scale, offset in zip(scales, offsets, strict=True)]
    dequantized = [dequantize_(block, q) for block, q in zip(blocks, qparams, strict=True)]
    return clamp_to_dtype(join_weight(dequantized, shape, grid), dtype).to(dtype)


def initial_scale(weight: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    """2 mean|w| / sqrt(quant_max) per group, fp32 of `layout.scale_shape` (Esser 2020, section 2.1)."""
    exact = weight.detach().to(working_dtype(weight)).contiguous()
    means = [mean_magnitude(block, (GROUP_AXIS,)) for block in split_weight(exact, grid)]
    largest = torch.finfo(exact.dtype).max
    return (join_scale(means, weight.shape, grid) * (2 / math.sqrt(grid.quant_max))).clamp_max(largest)
