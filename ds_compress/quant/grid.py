"""The grids of fake quantization, integers and small floats: their formulas, and one small class for each kind.

A value x in a group that shares one scale is stored as an integer q and read back as

    symmetric   scale = 2 max|x| / 2^b           q = clamp(round(x / scale), -2^(b-1), 2^(b-1) - 1)
    narrow      scale = max|x| / (2^(b-1) - 1)   q = round(x / scale), within +-(2^(b-1) - 1)
    asymmetric  scale = (max - min) / 2^b        q = clamp(round((x - offset) / scale), 0, 2^b - 1)
                offset = round(min / scale) scale                      (narrow: divided by 2^b - 1)
    ternary     t = 0.7 mean|x|                  q = sign(x) where |x| > t, else 0
                scale = mean of the |x| > t                (2 bits; Li & Liu 2016, "Ternary weight networks")
    binary      scale = mean|x|                  q = sign(x)   (1 bit; Rastegari et al. 2016, "XNOR-Net")

    float       scale of `ops.reference.float_formats`       q = the nearest number of the format, ties to even
    nf4         scale = max|x|                   q = the nearest of 16 quantiles of a normal distribution

and y = q * scale (+ offset). `offset` is -zero_point * scale: a float, because that is what the arithmetic adds.
Those of integers are the formulas of `deepspeed.compression`; `narrow` is ours: the legacy symmetric grid cannot
represent +max (1.0 becomes 0.992 at 8 bits), the narrow one can.

Numerics that hold everywhere in the library:
- Divisions are true divisions and rounding is half to even, so q is the formula's, not that of a multiplied
  reciprocal. All arithmetic is fp32 (fp64 for fp64 input) whatever the dtype of the tensor; the result is cast last.
- A scale of integers is at least 2^-126, so that a group of zeros reads back as zeros and never gives NaN. Asymmetric,
  a group whose scale would be smaller (all values equal) reads back as its constant.
- A zero reads back as zero on every grid but the legacy asymmetric one, where that needs a positive weight of half a
  scale in its group.
- A NaN or Inf makes every value of its group NaN: a fault is visible, not masked. With a *fixed* range only the
  NaN itself stays NaN, and Inf saturates like every value beyond the range.
- Nothing finite becomes Inf or NaN, up to the largest float: sums and differences that would overflow are computed
  from smaller numbers, and what a grid puts beyond the largest value of the dtype ends there.
- `dequantize(quantize(x))` equals `fake_quantize(x)` value by value (the sign of a zero is not stored).

`qparams` chooses scales and offsets, `arithmetic` quantizes and dequantizes one block with them, `weights` a whole
weight, and `layout` says which weights share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import torch

from ds_compress.ops.reference.float_formats import ScaleKind
from ds_compress.quant.formats import FORMATS, NumberFormat


class Granularity(StrEnum):
    """How many weights share one scale."""

    PER_TENSOR = "per_tensor"
    PER_GROUP = "per_group"  # equal runs of the flattened weight, the legacy `quantize_groups`
    PER_CHANNEL = "per_channel"  # an output channel; a row of an embedding
    PER_COLUMN_GROUP = "per_column_group"  # `group_size` inputs of one output channel
    PER_BLOCK = "per_block"  # a square of `group_size` outputs and as many inputs


class Levels(StrEnum):
    """The family of a grid."""

    UNIFORM = "uniform"
    TERNARY = "ternary"
    BINARY = "binary"
    FLOAT = "float"
    CODEBOOK = "codebook"


@dataclass(frozen=True)
class Grid:
    """What the grids of weights and of activations have in common; see the module for the formulas.

    format: "int", or a name of `formats.FORMATS`, which fixes `bits`.
    """

    bits: int
    symmetric: bool = True
    narrow_range: bool = False
    format: str = field(default="int", kw_only=True)

    @property
    def number_format(self) -> NumberFormat | None:
        """The floats or the codebook that a value is rounded to; None: integers."""
        return FORMATS.get(self.format)

    @property
    def levels(self) -> Levels:
        known = FORMATS.get(self.format)
        if known is None:
            return Levels.UNIFORM
        return Levels.CODEBOOK if known.number is None else Levels.FLOAT

    @property
    def has_global_scale(self) -> bool:
        """Whether scales are stored relative to one more, of the whole tensor (nvfp4)."""
        known = FORMATS.get(self.format)
        return known is not None and known.scale is ScaleKind.E4M3

    @property
    def quant_min(self) -> float:
        """The smallest quantized value; a whole number on integer grids."""
        if self.format != "int":
            return -FORMATS[self.format].largest
        if self.levels is not Levels.UNIFORM:
            return -1
        return 0 if not self.symmetric else -(2 ** (self.bits - 1)) + int(self.narrow_range)

    @property
    def quant_max(self) -> float:
        """The largest quantized value; a whole number on integer grids."""
        if self.format != "int":
            return FORMATS[self.format].largest
        if self.levels is not Levels.UNIFORM:
            return 1
        return 2**self.bits - 1 if not self.symmetric else 2 ** (self.bits - 1) - 1

    @property
    def scale_divisor(self) -> int:
        """What max|x| (symmetric) or max - min (asymmetric) is divided by to give the scale."""
        if self.symmetric:
            return 2 ** (self.bits - 1) - int(self.narrow_range)
        return 2**self.bits - int(self.narrow_range)

    @property
    def range_is_given(self) -> bool:
        """Whether the range comes from elsewhere than the values at hand."""
        return False

    @property
    def may_clip(self) -> bool:
        """Whether a value may lie beyond `quant_min` or `quant_max`."""
        # Not an override that calls super(): compiled code (Dynamo of torch 2.10) takes such a property for a tensor.
        return (
            self.range_is_given
            or self.has_global_scale  # rounded to E4M3, a scale may be too small for its block
            or (self.levels is Levels.UNIFORM and not (self.symmetric and self.narrow_range))
        )

    def describe(self) -> str:
        """A few words, e.g. "uint8 narrow" or "mxfp4"."""
        if self.format != "int":
            return self.format
        kind = (
            f"{'int' if self.symmetric else 'uint'}{self.bits}"
            if self.levels is Levels.UNIFORM
            else self.levels
        )
        return f"{kind} narrow" if self.narrow_range else str(kind)

    @property
    def quantized_dtype(self) -> torch.dtype:
        """Of stored values; floats are stored as their codes."""
        if self.format != "int":
            return torch.uint8
        return torch.int8 if self.symmetric else torch.uint8


@dataclass(frozen=True)
class WeightGrid(Grid):
    """The grid of a weight.

    `channel_axis`: the axis of output channels (0; 1 for Conv1D, which stores `[in, out]`); `groups` serves
    PER_GROUP, `group_size` PER_COLUMN_GROUP. `learned`: scales are parameters (LSQ), so 2 bits are the
    uniform values -1, 0, 1 and not the ternary formula. `stacked`: the weight is a stack of matrices, one for each
    expert, and its first axis numbers them; everything else holds for each matrix by itself. Raises ValueError for
    combinations without a formula.
    """

    granularity: Granularity = Granularity.PER_GROUP
    groups: int = 1
    group_size: int = 128
    channel_axis: int = 0
    stochastic: bool = False
    learned: bool = False
    stacked: bool = False

    def __post_init__(self) -> None:
        if (known := self.number_format) is not None and (self.bits != known.bits or not self.symmetric):
            raise ValueError(f"{self.format} has {known.bits} bits and is symmetric")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"weights have 1 to 8 bits, got {self.bits}")
        if self.groups < 1 or self.group_size < 1:
            raise ValueError("quantize_groups and group_size are at least 1")
        if self.learned and (self.bits < 2 or not self.symmetric or self.stochastic):
            raise ValueError("learned scales need 2 or more bits, a symmetric grid and nearest rounding")
        if self.bits <= 2 and not self.learned and (not self.symmetric or self.stochastic):
            raise ValueError("1 bit (binary) and 2 bits (ternary) have no offset and no rounding to choose")

    def describe(self) -> str:
        """A few words, e.g. "int4 per_column_group of 128, learned scales"."""
        size = {
            Granularity.PER_GROUP: f" of {self.groups}",
            Granularity.PER_COLUMN_GROUP: f" of {self.group_size}",
            Granularity.PER_BLOCK: f" of {self.group_size} x {self.group_size}",
        }
        words = f"{super().describe()} {self.granularity}{size.get(self.granularity, '')}"
        return (
            words + (", stochastic" if self.stochastic else "") + (", learned scales" if self.learned else "")
        )

    @property
    def levels(self) -> Levels:
        if (known := FORMATS.get(self.format)) is not None:
            return Levels.CODEBOOK if known.number is None else Levels.FLOAT
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
    PER_TOKEN_GROUP = "per_token_group"  # `group_size` neighbours on the last axis


@dataclass(frozen=True)
class ActivationGrid(Grid):
    """The grid of an activation; of a static grid the range is given, not measured.

    That range makes the one scale of the tensor; of nvfp4 the global one, while scales of blocks are measured.
    """

    granularity: TokenGranularity = TokenGranularity.PER_TOKEN
    static: bool = False
    group_size: int = 128

    def __post_init__(self) -> None:
        if (known := self.number_format) is not None and (self.bits != known.bits or not self.symmetric):
            raise ValueError(f"{self.format} has {known.bits} bits and is symmetric")
        if not 3 <= self.bits <= 8:
            raise ValueError(f"activations have 3 to 8 bits, got {self.bits}")

    def describe(self) -> str:
        """A few words, e.g. "int8 per_tensor static"."""
        size = f" of {self.group_size}" if self.granularity is TokenGranularity.PER_TOKEN_GROUP else ""
        return f"{super().describe()} {self.granularity}{size}" + (" static" if self.static else "")

    @property
    def range_is_given(self) -> bool:
        return self.static
