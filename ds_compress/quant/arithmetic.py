"""Quantizing and dequantizing one block: a tensor of fp32 or fp64 values over which its `QParams` broadcast."""

from __future__ import annotations

import math

import torch

from ds_compress.ops.reference.fake_quantize import SHRINK, SMALLEST_SCALE, is_extreme
from ds_compress.ops.reference.float_formats import FloatFormat, round_to_format
from ds_compress.quant.formats import nf4_codes, nf4_values
from ds_compress.quant.grid import Grid, Levels
from ds_compress.quant.qparams import QParams, signs_beyond


def working_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which `tensor` is quantized."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def normalize(values: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """(x - offset) / scale of a uniform grid: the quantized value before rounding. A new tensor."""
    if qparams.offset is None:
        return torch.div(values, qparams.scale)
    shrink = _shrink(qparams)
    if shrink is None:
        return torch.sub(values, qparams.offset).div_(qparams.scale)
    return (values * shrink).sub_(qparams.offset * shrink).div_(qparams.scale * shrink)


def _shrink(qparams: QParams) -> torch.Tensor | None:
    """What each group is multiplied by while it is quantized or dequantized, so that nothing overflows; None: by 1."""
    extreme = is_extreme(qparams.scale, qparams.offset, torch.finfo(qparams.scale.dtype).max)
    # Asking is a few small operations here; on a GPU it would wait for all that runs before.
    if not torch.compiler.is_compiling() and extreme.device.type == "cpu" and not bool(extreme.any()):
        return None
    return torch.where(extreme, SHRINK, 1.0).to(qparams.scale.dtype)


def round_and_clamp_(normalized: torch.Tensor, grid: Grid, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Normalized values to those of the grid, in place for integers; `noise` in [0, 1) makes rounding stochastic."""
    if grid.levels is Levels.CODEBOOK:
        rounded = nf4_values(nf4_codes(normalized), normalized.dtype)
        return torch.where(normalized.isnan(), normalized, rounded)
    if grid.levels is Levels.FLOAT:
        return round_to_format(normalized, _number(grid), noise).clamp_(grid.quant_min, grid.quant_max)
    quantized = normalized.round_() if noise is None else normalized.add_(noise).floor_()
    if grid.may_clip or noise is not None:
        quantized.clamp_(grid.quant_min, grid.quant_max)
    return quantized


def quantize_block(
    values: torch.Tensor, qparams: QParams, grid: Grid, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """The quantized `values`, still in floating point. A new tensor."""
    match grid.levels:
        case Levels.TERNARY:
            return signs_beyond(values, _required(qparams.threshold))
        case Levels.BINARY:
            return values.sign()
        case Levels.UNIFORM:
            return round_and_clamp_(normalize(values, qparams), grid, zero_preserving(noise, values))
        case Levels.FLOAT | Levels.CODEBOOK:
            return round_and_clamp_(normalize(values, qparams), grid, noise)


def zero_preserving(noise: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor | None:
    """`noise` for stochastic rounding, under which a zero stays the zero of an asymmetric grid.

    Its normalized value is a whole number but for the rounding of the division, and floor() would see that.
    """
    return None if noise is None else torch.where(values == 0, 0.5, noise)


def dequantize_(quantized: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """q * scale (+ offset), at most the largest float; overwrites `quantized`."""
    shrink = _shrink(qparams)
    if shrink is None:
        quantized.mul_(qparams.scale)
        return quantized if qparams.offset is None else quantized.add_(qparams.offset)
    quantized.mul_(qparams.scale * shrink)
    if qparams.offset is not None:
        quantized.add_(qparams.offset * shrink)
    largest = torch.finfo(quantized.dtype).max
    return torch.minimum(torch.maximum(quantized, shrink * -largest), shrink * largest).div_(shrink)


def clamp_to_dtype(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantized values, of which what is finite and beyond the largest value of a smaller `dtype` becomes that."""
    if dtype.itemsize < values.dtype.itemsize:
        return values.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return values


def unclipped_interval(grid: Grid, dtype: torch.dtype, stochastic: bool = False) -> tuple[float, float]:
    """The open interval of normalized values that are rounded to the grid without clipping, ends exact in `dtype`."""
    if grid.format != "int":
        end = grid.quant_max
        if grid.levels is Levels.FLOAT and not stochastic:
            end = _rounded_beyond(_number(grid), dtype)
        else:
            end = _next_away(end, dtype)
        return -end, end
    if stochastic:  # floor(v): the integer `quant_min` itself does not clip
        return _next_away(grid.quant_min, dtype) if grid.quant_min else -SMALLEST_SCALE, float(
            grid.quant_max + 1
        )
    # Half to even: quant_min - 1/2 rounds to quant_min when that is even, quant_max + 1/2 to quant_max likewise.
    low, high = grid.quant_min - 0.5, grid.quant_max + 0.5
    return (
        low if grid.quant_min % 2 else _next_away(low, dtype),
        high if grid.quant_max % 2 else _next_away(high, dtype),
    )


def _rounded_beyond(number: FloatFormat, dtype: torch.dtype) -> float:
    """The least value that would be rounded to the next number after `largest`, were there one."""
    step = 2.0 ** (number.largest_exponent - number.mantissa_bits)
    is_even = number.largest / step % 2 == 0
    middle = number.largest + step / 2
    return _next_away(middle, dtype) if is_even else middle


def _number(grid: Grid) -> FloatFormat:
    known = grid.number_format
    if known is None or known.number is None:
        raise ValueError(f"{grid.describe()} is no grid of floating-point numbers")
    return known.number


def _next_away(value: float, dtype: torch.dtype) -> float:
    """The next number of `dtype` further from zero."""
    digits = 53 if dtype is torch.float64 else 24
    return value + math.copysign(2.0 ** (math.frexp(abs(value))[1] - digits), value)


def _required(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise ValueError("these qparams were not chosen for this grid")
    return tensor
