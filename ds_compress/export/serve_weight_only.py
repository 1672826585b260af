"""Linear layers that keep their weight in 2 to 8 bits, and inputs in floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.shape_only import ShapeOnly
from ds_compress.ops import kernels
from ds_compress.ops.reference.float_formats import E2M3, decode

_SMALLEST_GROUP = 8
_E2M1_FORMATS = ("mxfp4", "nvfp4")
_E2M3_STEP = 0.125


@dataclass(frozen=True)
class _Stored:
    """What `weight_only_linear_pack` takes."""

    values: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    group_size: int
    storage: str


class WeightOnlyLinear(nn.Module):
    """activation(x @ weight.T + bias), x in fp32, bf16 or fp16; the weight is packed for the kernel at once.

    Raises:
        ValueError: no kernel has the weight's numbers; see `weight_only_misfit`.
    """

    def __init__(self, quantized: QuantizedMatrix, bias: torch.Tensor | None) -> None:
        super().__init__()
        reason = weight_only_misfit(quantized)
        if reason is not None:
            raise ValueError(reason)
        self.out_features, self.in_features = quantized.values.shape
        self.bias = None if bias is None else bias.detach().float()
        self.activation, self.bits, self.format = "none", quantized.bits, quantized.format
        stored = _stored(quantized)
        self.group_size = stored.group_size
        self.packed: torch.Tensor = kernels().weight_only_linear_pack(
            stored.values, stored.scale, stored.offset, stored.group_size, stored.storage
        )

    @property
    def weight(self) -> torch.Tensor:
        """Its shape and dtype, for models that look at them."""
        return ShapeOnly.of(self.out_features, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = kernels().weight_only_linear(
            input, self.packed, self.out_features, self.bias, activation=self.activation
        )
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"format={self.format}, group_size={self.group_size}, activation={self.activation}"
        )


def weight_only_misfit(quantized: QuantizedMatrix) -> str | None:
    """Why no kernel multiplies floats by this weight; None where one does."""
    if quantized.format not in ("int", *_E2M1_FORMATS, "mxfp6_e2m3"):
        return f"weights are {quantized.format}"
    if quantized.groups > 1 and quantized.group_size < _SMALLEST_GROUP:
        return f"weights are in groups of {quantized.group_size}, fewer than {_SMALLEST_GROUP}"
    return None


def _stored(quantized: QuantizedMatrix) -> _Stored:
    rows, columns = quantized.values.shape
    group_size = min(quantized.group_size, columns) if quantized.groups > 1 else columns
    scale = quantized.scale.repeat_interleave(quantized.group_rows, 0)[:rows].contiguous()
    if quantized.format in _E2M1_FORMATS:  # the kernel counts in halves
        return _Stored(quantized.values, scale * 0.5, None, group_size, "e2m1")
    if quantized.format == "mxfp6_e2m3":
        whole = decode(quantized.values, E2M3) / _E2M3_STEP
        return _Stored(whole.to(torch.int8), scale * _E2M3_STEP, None, group_size, "int8")
    storage = "int2" if quantized.bits <= 2 else "int4" if quantized.bits <= 4 else "int8"
    return _Stored(quantized.values, scale, quantized.offset, group_size, storage)
