"""Floating-point numbers of 4 to 8 bits and the scales that go with them, in plain torch.

A number has a sign, `exponent_bits` and `mantissa_bits`; below the smallest normal number its steps stay equal
(subnormal numbers), and what lies beyond `largest` saturates there. Rounding is to nearest, ties to the even mantissa.
Formats: OCP "8-bit floating point" 1.0 (E4M3, E5M2), OCP "Microscaling formats (MX)" 1.0 (E2M1, E2M3, E3M2, E8M0).

Scales of a block whose largest magnitude is amax, each as `compressed_tensors` 0.20 computes them:

    fp32    amax / largest, 2^-23 where that is zero
    e8m0    2^(e - emax), e the exponent of amax after its mantissa was rounded up where amax would lie beyond
            `largest`; emax that of `largest`. Stored as e - emax + 127, 0 to 254.
    e4m3    E4M3(g * (amax / largest)) / g, g the global scale of the whole tensor: 448 * largest / amax of the
            tensor. 0.125 / g where E4M3 gives zero.

A block with a NaN or Inf has the scale NaN: a fault is visible (compressed_tensors gives most such blocks a number).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch

from ds_compress.ops.reference.division import divided

SMALLEST_NORMAL = 2.0**-126
_EPSILON = 2.0**-23
_ZERO_IN_E4M3 = 0.125


@dataclass(frozen=True)
class FloatFormat:
    """`largest`: the largest finite number, which need not use the largest exponent and mantissa (E4M3: 448)."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def smallest_exponent(self) -> int:
        """That of the smallest normal number."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def largest_exponent(self) -> int:
        """That of `largest`."""
        return math.frexp(self.largest)[1] - 1

    @property
    def scale_rounding_bits(self) -> int:
        """An amax is rounded to so many mantissa bits before its exponent becomes an E8M0 scale.

        So many as make an amax count for the next power where it would round beyond `largest`; for E4M3
        `compressed_tensors` takes one bit, with which the very amax that would become 448 does so, too.
        """
        is_e4m3 = (self.exponent_bits, self.mantissa_bits) == (4, 3)
        return 1 if is_e4m3 else self.mantissa_bits


E2M1 = FloatFormat("e2m1", 2, 1, 6.0)
E2M3 = FloatFormat("e2m3", 2, 3, 7.5)
E3M2 = FloatFormat("e3m2", 3, 2, 28.0)
E4M3 = FloatFormat("e4m3", 4, 3, 448.0)
E5M2 = FloatFormat("e5m2", 5, 2, 57344.0)
FLOAT_FORMATS = {known.name: known for known in (E2M1, E2M3, E3M2, E4M3, E5M2)}


class ScaleKind(IntEnum):
    """How a scale is stored; the values are those of the op `fake_quantize_float`."""

    FP32 = 0
    E8M0 = 1
    E4M3 = 2


def round_to_format(
    values: torch.Tensor, number: FloatFormat, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """The nearest number of an unlimited exponent upwards: what lies beyond `largest` is still to be clamped.

    Exact in fp32 and fp64; keeps the sign of zero; Inf and NaN stay. noise: in [0, 1) for each value, for stochastic
    rounding: up where the part that rounding cuts off, as a share of the step, plus the noise reaches 1.
    """
    step = _steps(values, number)
    in_steps = values / step
    if noise is None:
        rounded = torch.round(in_steps)
    else:
        rounded = torch.floor(in_steps)
        # Their sum would round where the value has digits before the point, and so move numbers of the format.
        rounded = rounded + (in_steps - rounded + noise >= 1)
    # An infinite value has an infinite quotient and a step; a subnormal result keeps its sign.
    return torch.copysign(rounded * step, values)


def _steps(values: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """The distance of neighbouring numbers where each value lies: a power of two."""
    exponent = torch.frexp(values.abs().nan_to_num_(1.0, 1.0)).exponent - 1
    exponent = exponent.clamp_(min=number.smallest_exponent) - number.mantissa_bits
    return power_of_two(exponent, values.dtype)


def block_scale(
    amax: torch.Tensor, number: FloatFormat, kind: ScaleKind, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """What a quantized number of a block with this largest magnitude is multiplied by; fp32 or fp64 like `amax`.

    global_scale: of kind E4M3, one number.
    """
    match kind:
        case ScaleKind.FP32:
            scale = divided(amax, number.largest)
            scale = torch.where(scale == 0, _EPSILON, scale)
        case ScaleKind.E8M0:
            scale = power_of_two(scale_exponent(amax, number), amax.dtype)
        case ScaleKind.E4M3:
            if global_scale is None:
                raise ValueError("scales in E4M3 need a global scale")
            scale = e4m3_scale(amax, number, global_scale) / global_scale
    return torch.where(amax.isfinite(), scale, math.nan)


def scale_exponent(amax: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """int32, -127 to 127: the E8M0 scale of a block is two to this."""
    exact = amax.to(torch.float32)
    half_step = 1 << (23 - number.scale_rounding_bits - 1)
    exponent = (exact.view(torch.int32) + half_step).bitwise_right_shift(23) - 127
    return (exponent - number.largest_exponent).clamp_(-127, 127)


def power_of_two(exponent: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """2^exponent, exactly, subnormal numbers too."""
    return torch.ldexp(torch.ones_like(exponent, dtype=dtype), exponent)


def e4m3_scale(amax: torch.Tensor, number: FloatFormat, global_scale: torch.Tensor) -> torch.Tensor:
    """The stored scale of a block: a number of E4M3, before the division by the global scale."""
    return stored_e4m3(global_scale * divided(amax, number.largest))


def stored_e4m3(wanted: torch.Tensor) -> torch.Tensor:
    """The positive number of E4M3 that stands for a wanted one."""
    stored = round_to_format(wanted, E4M3).clamp_(max=E4M3.largest)
    return torch.where(stored == 0, _ZERO_IN_E4M3, stored)


def global_scale_of(amax: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """448 * largest / amax of a whole tensor, 1 where that overflows; fp32, NaN where amax is not finite.

    A number divided by a tensor is for torch, and so for `compressed_tensors`, a product with the rounded reciprocal.
    """
    exact = amax.to(torch.float32)
    wanted = exact.clamp(min=SMALLEST_NORMAL).reciprocal() * (E4M3.largest * number.largest)
    return torch.where(exact.isfinite(), torch.where(wanted.isinf(), 1.0, wanted), math.nan)


def encode(values: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """uint8 codes (sign, exponent, mantissa from the highest bit down) of numbers that are on the format's grid."""
    magnitude = values.abs()
    exponent = torch.frexp(magnitude).exponent - 1
    field = (exponent - number.smallest_exponent + 1).clamp_(min=0)
    field = torch.where(magnitude == 0, 0, field)
    in_steps = torch.round(magnitude / _steps(values, number)).to(torch.int32)
    mantissa = torch.where(field == 0, in_steps, in_steps - (1 << number.mantissa_bits))
    code = (field << number.mantissa_bits) + mantissa
    return (code + (values.signbit().to(torch.int32) << (number.bits - 1))).to(torch.uint8)


def decode(codes: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """fp32 numbers of uint8 codes; those that E4M3 and E5M2 use for NaN and Inf are not known here."""
    whole = codes.to(torch.int32)
    sign = 1 - 2 * ((whole >> (number.bits - 1)) & 1)
    field = (whole >> number.mantissa_bits) & ((1 << number.exponent_bits) - 1)
    mantissa = whole & ((1 << number.mantissa_bits) - 1)
    in_steps = torch.where(field == 0, mantissa, mantissa + (1 << number.mantissa_bits))
    exponent = field.clamp(min=1) - 1 + number.smallest_exponent - number.mantissa_bits
    magnitude = torch.ldexp(in_steps.to(torch.float32), exponent)
    return torch.copysign(magnitude, sign.to(torch.float32))
