"""The number formats that a weight or an input can be quantized to, by the names that the JSON has for them.

    fp8_e4m3, fp8_e5m2              8-bit floats; fp32 scales, shared by a tensor, a channel, a token or a square block
    mxfp8, mxfp6_e2m3, mxfp6_e3m2,  OCP microscaling: a power of two (E8M0) for each 32 inputs
    mxfp4
    nvfp4                           4-bit floats (E2M1); an E4M3 scale for each 16 inputs, an fp32 one for the tensor
    nf4                             16 quantiles of a normal distribution (Dettmers et al. 2023, "QLoRA", appendix
                                    E); an fp32 scale for each 64 inputs

Numbers and scales are those of `ops.reference.float_formats`. Integers (`int`) are no entry here: `quant.grid`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_compress.ops.reference.float_formats import E2M1, E2M3, E3M2, E4M3, E5M2, FloatFormat, ScaleKind


@dataclass(frozen=True)
class NumberFormat:
    """`number`: the floating-point format, None for the codebook of nf4. block: inputs that share a scale, where the
    format fixes or suggests that; None: the granularity is free."""

    name: str
    number: FloatFormat | None
    scale: ScaleKind
    block: int | None = None

    @property
    def bits(self) -> int:
        return 4 if self.number is None else self.number.bits

    @property
    def largest(self) -> float:
        """The largest quantized value."""
        return 1.0 if self.number is None else self.number.largest

    @property
    def scale_bits(self) -> int:
        """Of one stored scale."""
        return 32 if self.scale is ScaleKind.FP32 else 8

    @property
    def has_global_scale(self) -> bool:
        """Whether one more scale is shared by the whole tensor."""
        return self.scale is ScaleKind.E4M3


FORMATS = {
    known.name: known
    for known in (
        NumberFormat("fp8_e4m3", E4M3, ScaleKind.FP32),
        NumberFormat("fp8_e5m2", E5M2, ScaleKind.FP32),
        NumberFormat("mxfp8", E4M3, ScaleKind.E8M0, 32),
        NumberFormat("mxfp6_e2m3", E2M3, ScaleKind.E8M0, 32),
        NumberFormat("mxfp6_e3m2", E3M2, ScaleKind.E8M0, 32),
        NumberFormat("mxfp4", E2M1, ScaleKind.E8M0, 32),
        NumberFormat("nvfp4", E2M1, ScaleKind.E4M3, 16),
        NumberFormat("nf4", None, ScaleKind.FP32, 64),
    )
}

# Computed as the paper says, from quantiles of N(0, 1); the numbers of bitsandbytes.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4_codes(values: torch.Tensor) -> torch.Tensor:
    """int64 index of the nearest of `NF4` for each value; a NaN gets the last."""
    table = torch.tensor(NF4, dtype=values.dtype, device=values.device)
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2)


def nf4_values(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The numbers of codes 0 to 15."""
    return torch.tensor(NF4, dtype=dtype, device=codes.device)[codes.long()]
