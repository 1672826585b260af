"""The integer grids of fake quantization, as pure functions without autograd.

A value x in a group that shares one scale is stored as an integer code and read back as

    symmetric   scale = 2 max|x| / 2^b           code = clamp(round(x / scale), -2^(b-1), 2^(b-1) - 1)
    narrow      scale = max|x| / (2^(b-1) - 1)   code = round(x / scale), within +-(2^(b-1) - 1)
    asymmetric  scale = (max - min) / 2^b        code = clamp(round((x - offset) / scale), 0, 2^b - 1)
                offset = round(min / scale) scale                      (narrow: divided by 2^b - 1)
    ternary     t = 0.7 mean|x|                  code = sign(x) where |x| > t, else 0
                scale = mean of the |x| > t                (2 bits; Li & Liu 2016, "Ternary weight networks")
    binary      scale = mean|x|                  code = sign(x)   (1 bit; Rastegari et al. 2016, "XNOR-Net")

and y = code * scale (+ offset). These are the formulas of `deepspeed.compression`; `narrow` is ours: the
legacy symmetric grid cannot represent +max (1.0 becomes 0.992 at 8 bits), the narrow one can.

Numerics that hold everywhere in the library:
- Divisions are true divisions and rounding is half to even, so a code is the formula's, not that of a
  multiplied reciprocal. All arithmetic is fp32 (fp64 for fp64 input) whatever the dtype of the tensor; the
  result is cast last.
- A scale is at least 2^-126, so that a group of zeros reads back as zeros and never gives NaN. Asymmetric, a
  group whose scale would be smaller (all values equal) reads back as its constant.
- A zero reads back as zero on every grid but the legacy asymmetric one, where that needs a positive weight of half a
  scale in its group.
- A NaN or Inf makes every value of its group NaN: a fault is seen, not masked. With a *fixed* range only the
  NaN itself stays NaN, and Inf saturates like every value beyond the range.
- Nothing finite becomes Inf or NaN, up to the largest float: sums and differences that would overflow are made of
  smaller numbers, and what a grid puts beyond the largest value of the dtype ends there.
- `dequantize(quantize(x))` equals `fake_quantize(x)` value by value (the sign of a zero is not stored).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from ds_compress.ops.reference.division import divided
from ds_compress.ops.reference.fake_quantize import SHRINK, SMALLEST_SCALE, asymmetric_range, is_extreme
from ds_compress.quant.layout import (
    GROUP_AXIS,
    Granularity,
    join_scale,
    join_weight,
    scale_shape,
    split_scale,
    split_weight,
)


class Levels(StrEnum):
    """The family of a grid."""

    UNIFORM = "uniform"
    TERNARY = "ternary"
    BINARY = "binary"


@dataclass(frozen=True)
class Grid:
    """What the grids of weights and of activations have in common; see the module for the formulas."""

    bits: int
    symmetric: bool = True
    narrow_range: bool = False

    @property
    def levels(self) -> Levels:
        return Levels.UNIFORM

    @property
    def low(self) -> int:
        """The smallest code."""
        if self.levels is not Levels.UNIFORM:
            return -1
        return 0 if not self.symmetric else -(2 ** (self.bits - 1)) + int(self.narrow_range)

    @property
    def high(self) -> int:
        """The largest code."""
        if self.levels is not Levels.UNIFORM:
            return 1
        return 2**self.bits - 1 if not self.symmetric else 2 ** (self.bits - 1) - 1

    @property
    def steps(self) -> int:
        """How many scales fit into max|x| (symmetric) or into max - min (asymmetric)."""
        if self.symmetric:
            return 2 ** (self.bits - 1) - int(self.narrow_range)
        return 2**self.bits - int(self.narrow_range)

    @property
    def range_is_given(self) -> bool:
        """Whether the range comes from elsewhere than the values at hand."""
        return False

    @property
    def may_clip(self) -> bool:
        """Whether a value may lie beyond the outermost codes."""
        # Not an override that calls super(): compiled code (Dynamo of torch 2.10) takes such a property for a tensor.
        return self.range_is_given or (
            self.levels is Levels.UNIFORM and not (self.symmetric and self.narrow_range)
        )

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.symmetric else torch.uint8


@dataclass(frozen=True)
class WeightGrid(Grid):
    """The grid of a weight.

    `channel_axis`: the axis of output channels (0; 1 for Conv1D, which stores `[in, out]`); `groups` serves
    PER_GROUP, `group_size` PER_COLUMN_GROUP. `learned`: scales are parameters (LSQ), so 2 bits are the
    uniform codes -1, 0, 1 and not the ternary formula. Raises ValueError for combinations without a formula.
    """

    granularity: Granularity = Granularity.PER_GROUP
    groups: int = 1
    group_size: int = 128
    channel_axis: int = 0
    stochastic: bool = False
    learned: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"weights have 1 to 8 bits, got {self.bits}")
        if self.groups < 1 or self.group_size < 1:
            raise ValueError("quantize_groups and group_size are at least 1")
        if self.learned and (self.bits < 2 or not self.symmetric or self.stochastic):
            raise ValueError("learned scales need 2 or more bits, a symmetric grid and nearest rounding")
        if self.bits <= 2 and not self.learned and (not self.symmetric or self.stochastic):
            raise ValueError("1 bit (binary) and 2 bits (ternary) have no offset and no rounding to choose")

    @property
    def levels(self) -> Levels:
        if self.learned or self.bits > 2:
            return Levels.UNIFORM
        return Levels.TERNARY if self.bits == 2 else Levels.BINARY

    @property
    def range_is_given(self) -> bool:
        return self.learned


class TokenGranularity(StrEnum):
    """Which activations share one range."""

    PER_TOKEN = "per_token"  # the last axis
    PER_SAMPLE = "per_sample"  # everything but the first axis: an image
    PER_TENSOR = "per_tensor"


@dataclass(frozen=True)
class ActivationGrid(Grid):
    """The grid of an activation; a static grid is per tensor and its range is given, not measured."""

    granularity: TokenGranularity = TokenGranularity.PER_TOKEN
    static: bool = False

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 8:
            raise ValueError(f"activations have 3 to 8 bits, got {self.bits}")

    @property
    def range_is_given(self) -> bool:
        return self.static


@dataclass(frozen=True)
class Ranges:
    """What a group's codes mean; tensors that broadcast over the values. `threshold`: ternary only."""

    scale: torch.Tensor
    offset: torch.Tensor | None = None
    threshold: torch.Tensor | None = None


@dataclass(frozen=True)
class Quantized:
    """A weight as integers: `codes` (int8, uint8 when asymmetric) in its shape, fp32 `scale` and `offset` of
    `layout.scale_shape`."""

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    grid: WeightGrid


def working_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


# --- one block: tensors whose groups lie along `axes` ------------------------------------------------------


def measure(values: torch.Tensor, axes: tuple[int, ...], grid: Grid) -> Ranges:
    """The ranges of groups that lie along `axes` (kept as size 1) of an fp32 or fp64 tensor."""
    if values.numel() == 0:
        nothing = values.sum(axes, keepdim=True)
        return ranges_between(nothing, nothing, grid)
    match grid.levels:
        case Levels.TERNARY:
            return _measure_ternary(values, axes)
        case Levels.BINARY:
            mean = mean_magnitude(values, axes)
            return Ranges(scale=_nan_unless_finite(mean, mean))
        case Levels.UNIFORM:
            # Twice faster than aminmax or a vector norm, which are not vectorised along an axis.
            lowest, highest = values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)
            return ranges_between(lowest, highest, grid)


def ranges_between(lowest: torch.Tensor, highest: torch.Tensor, grid: Grid) -> Ranges:
    """The ranges of a uniform grid over values from `lowest` to `highest` (same shape)."""
    if grid.levels is not Levels.UNIFORM:
        return Ranges(scale=torch.ones_like(lowest), threshold=torch.zeros_like(lowest))
    if grid.symmetric:
        # Few operations: on a small layer, these tiny ones cost more than the elementwise passes.
        return Ranges(
            scale=divided(torch.maximum(highest, lowest.neg()), grid.steps).clamp_min_(SMALLEST_SCALE)
        )
    scale, offset = asymmetric_range(lowest, highest, grid.steps)
    return Ranges(scale=scale, offset=offset)


def normalize(values: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """(x - offset) / scale of a uniform grid: the code before rounding. A new tensor."""
    if ranges.offset is None:
        return torch.div(values, ranges.scale)
    shrink = _shrink(ranges)
    if shrink is None:
        return torch.sub(values, ranges.offset).div_(ranges.scale)
    return (values * shrink).sub_(ranges.offset * shrink).div_(ranges.scale * shrink)


def _shrink(ranges: Ranges) -> torch.Tensor | None:
    """What each group is multiplied by on the way to its codes and back, so that nothing overflows; None: all by 1."""
    extreme = is_extreme(ranges.scale, ranges.offset, torch.finfo(ranges.scale.dtype).max)
    # Asking is a few small operations here; on a GPU it would wait for all that runs before.
    if not torch.compiler.is_compiling() and extreme.device.type == "cpu" and not bool(extreme.any()):
        return None
    return torch.where(extreme, SHRINK, 1.0).to(ranges.scale.dtype)


def round_codes_(normalized: torch.Tensor, grid: Grid, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Normalized values to whole codes, in place; `noise` in [0, 1) makes the rounding stochastic."""
    codes = normalized.round_() if noise is None else normalized.add_(noise).floor_()
    if grid.may_clip or noise is not None:
        codes.clamp_(grid.low, grid.high)
    return codes


def encode(
    values: torch.Tensor, ranges: Ranges, grid: Grid, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """The codes of `values`, still in floating point. A new tensor."""
    match grid.levels:
        case Levels.TERNARY:
            return _signs_beyond(values, _required(ranges.threshold))
        case Levels.BINARY:
            return values.sign()
        case Levels.UNIFORM:
            return round_codes_(normalize(values, ranges), grid, steadied(noise, values))


def steadied(noise: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor | None:
    """`noise` for stochastic rounding, under which a zero stays the zero of an asymmetric grid.

    Its normalized value is a whole number but for the rounding of the division, and floor() would see that.
    """
    return None if noise is None else torch.where(values == 0, 0.5, noise)


def decode_(codes: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """code * scale (+ offset), at most the largest float; overwrites `codes`."""
    shrink = _shrink(ranges)
    if shrink is None:
        codes.mul_(ranges.scale)
        return codes if ranges.offset is None else codes.add_(ranges.offset)
    codes.mul_(ranges.scale * shrink)
    if ranges.offset is not None:
        codes.add_(ranges.offset * shrink)
    largest = torch.finfo(codes.dtype).max
    return torch.minimum(torch.maximum(codes, shrink * -largest), shrink * largest).div_(shrink)


def within(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decoded values, of which what is finite and beyond the largest value of a smaller `dtype` becomes that."""
    if dtype.itemsize < values.dtype.itemsize:
        return values.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return values


def kept_interval(grid: Grid, dtype: torch.dtype, stochastic: bool = False) -> tuple[float, float]:
    """The open interval of normalized values whose rounded code lies on the grid, ends exact in `dtype`."""
    if stochastic:  # floor(v): the integer `low` itself is kept
        return _next_away(grid.low, dtype) if grid.low else -SMALLEST_SCALE, float(grid.high + 1)
    # Half to even: low - 1/2 rounds to `low` when that is even, high + 1/2 to `high` when that is even.
    low, high = grid.low - 0.5, grid.high + 0.5
    return (
        low if grid.low % 2 else _next_away(low, dtype),
        high if grid.high % 2 else _next_away(high, dtype),
    )


# --- a whole weight ----------------------------------------------------------------------------------------


def weight_ranges(weight: torch.Tensor, grid: WeightGrid) -> list[Ranges]:
    """Measured ranges of each block of `layout.split_weight`; arithmetic in `working_dtype`."""
    exact = weight.to(working_dtype(weight)).contiguous()
    return [measure(block, (GROUP_AXIS,), grid) for block in split_weight(exact, grid)]


def learned_ranges(scale: torch.Tensor, shape: Sequence[int], grid: WeightGrid) -> list[Ranges]:
    """Ranges from given scales of `layout.scale_shape`: |scale|, and at least 2^-126."""
    exact = scale.to(working_dtype(scale)).abs().clamp_min(SMALLEST_SCALE)
    return [Ranges(scale=block) for block in split_scale(exact, shape, grid)]


def encode_weight(
    weight: torch.Tensor, ranges: list[Ranges], grid: WeightGrid, noise: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Floating-point codes of each block; `noise`: one number in [0, 1) per weight, in the weight's shape."""
    exact = weight.to(working_dtype(weight)).contiguous()
    blocks = split_weight(exact, grid)
    noises = split_weight(noise, grid) if noise is not None else [None] * len(blocks)
    return [encode(block, r, grid, n) for block, r, n in zip(blocks, ranges, noises, strict=True)]


def fake_quantize(
    weight: torch.Tensor,
    grid: WeightGrid,
    noise: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight as its codes read back, in the weight's dtype and shape.

    `noise`: see `encode_weight`; `scale`: given scales of `layout.scale_shape` (LSQ), else measured ones.
    """
    ranges = weight_ranges(weight, grid) if scale is None else learned_ranges(scale, weight.shape, grid)
    codes = encode_weight(weight, ranges, grid, noise)
    decoded = [decode_(block, r) for block, r in zip(codes, ranges, strict=True)]
    return within(join_weight(decoded, weight.shape, grid), weight.dtype).to(weight.dtype)


def quantize(
    weight: torch.Tensor,
    grid: WeightGrid,
    noise: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> Quantized:
    """The integers behind `fake_quantize` of the same arguments. The codes of a NaN group mean nothing."""
    ranges = weight_ranges(weight, grid) if scale is None else learned_ranges(scale, weight.shape, grid)
    codes = join_weight(encode_weight(weight, ranges, grid, noise), weight.shape, grid)
    offsets = [r.offset for r in ranges if r.offset is not None]
    return Quantized(
        codes=codes.nan_to_num_(0.0).to(grid.code_dtype),
        scale=join_scale([r.scale for r in ranges], weight.shape, grid),
        offset=join_scale(offsets, weight.shape, grid) if offsets else None,
        grid=grid,
    )


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """code * scale (+ offset) in the arithmetic of `fake_quantize`, cast to `dtype` last."""
    shape, grid = quantized.codes.shape, quantized.grid
    scales = split_scale(quantized.scale, shape, grid)
    offsets: Sequence[torch.Tensor | None] = [None] * len(scales)
    if quantized.offset is not None:
        offsets = split_scale(quantized.offset, shape, grid)
    blocks = split_weight(quantized.codes.to(quantized.scale.dtype), grid)
    ranges = [Ranges(scale, offset) for scale, offset in zip(scales, offsets, strict=True)]
    decoded = [decode_(block, r) for block, r in zip(blocks, ranges, strict=True)]
    return within(join_weight(decoded, shape, grid), dtype).to(dtype)


def initial_scale(weight: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    """2 mean|w| / sqrt(largest code) per group, fp32 of `layout.scale_shape` (Esser 2020, section 2.1)."""
    exact = weight.detach().to(working_dtype(weight)).contiguous()
    means = [mean_magnitude(block, (GROUP_AXIS,)) for block in split_weight(exact, grid)]
    largest = torch.finfo(exact.dtype).max
    return (join_scale(means, weight.shape, grid) * (2 / math.sqrt(grid.high))).clamp_max(largest)


def _measure_ternary(values: torch.Tensor, axes: tuple[int, ...]) -> Ranges:
    mean = mean_magnitude(values, axes)
    threshold = mean * 0.7
    beyond = _signs_beyond(values, threshold)
    count = beyond.abs().sum(axes, keepdim=True).clamp_min_(1)
    scale = _finite_sum(beyond.mul_(values), axes, count)
    return Ranges(scale=_nan_unless_finite(scale, mean), threshold=threshold)


def mean_magnitude(values: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """mean|x| along `axes` (kept as size 1), finite where all values are."""
    magnitudes = values.abs()
    mean = magnitudes.mean(axes, keepdim=True)
    return _unless_overflown(mean, lambda: (magnitudes * _OF_MANY).mean(axes, keepdim=True))


def _finite_sum(values: torch.Tensor, axes: tuple[int, ...], count: torch.Tensor) -> torch.Tensor:
    """The sum along `axes` over `count`, finite where that is."""
    total = values.sum(axes, keepdim=True)
    return _unless_overflown(total / count, lambda: (values * _OF_MANY).sum(axes, keepdim=True) / count)


_OF_MANY = 2.0**-40
"""Exact, and so small that no sum over a weight overflows."""


def _unless_overflown(result: torch.Tensor, of_small: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`result`, and where that is Inf or NaN the one that was made of values times `_OF_MANY`."""
    finite = result.isfinite()
    if not torch.compiler.is_compiling() and result.device.type == "cpu" and bool(finite.all()):
        return result
    return torch.where(finite, result, of_small() / _OF_MANY)


def _signs_beyond(values: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """sign(x) where |x| > threshold, else 0; minimum and maximum are four times as fast as clamp here."""
    within = torch.minimum(torch.maximum(values, threshold.neg()), threshold)
    return within.neg_().add_(values).sign_()


def _nan_unless_finite(scale: torch.Tensor, evidence: torch.Tensor) -> torch.Tensor:
    return scale + (evidence - evidence)


def _next_away(value: float, dtype: torch.dtype) -> float:
    """The next number of `dtype` further from zero."""
    digits = 53 if dtype is torch.float64 else 24
    return value + math.copysign(2.0 ** (math.frexp(abs(value))[1] - digits), value)


def _required(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise ValueError("these ranges were not measured for this grid")
    return tensor


__all__ = [
    "SMALLEST_SCALE",
    "ActivationGrid",
    "Granularity",
    "Grid",
    "Levels",
    "Quantized",
    "Ranges",
    "TokenGranularity",
    "WeightGrid",
    "decode_",
    "dequantize",
    "encode",
    "encode_weight",
    "fake_quantize",
    "initial_scale",
    "kept_interval",
    "learned_ranges",
    "mean_magnitude",
    "measure",
    "normalize",
    "quantize",
    "ranges_between",
    "round_codes_",
    "scale_shape",
    "weight_ranges",
    "within",
    "working_dtype",
]
