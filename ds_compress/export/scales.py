"""Scales as their formats store them, and back: 8 bits where that is exact, with the same bits as in training."""

from __future__ import annotations

import torch

from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.ops.reference.float_formats import ScaleKind, power_of_two
from ds_compress.quant.formats import FORMATS

_BIAS = 127


def stored_scale(quantized: QuantizedMatrix) -> torch.Tensor:
    """fp32; uint8 of powers of two; float8_e4m3fn of those beside a global scale.

    Raises:
        ValueError: they cannot be stored with the same bits.
    """
    scale, kind = quantized.scale, _kind(quantized.format)
    if kind is ScaleKind.FP32:
        return scale
    if kind is ScaleKind.E8M0:
        stored = (torch.frexp(scale).exponent - 1 + _BIAS).to(torch.uint8)
    else:
        assert quantized.global_scale is not None
        stored = (scale * quantized.global_scale).to(torch.float8_e4m3fn)
    if not torch.equal(loaded_scale(stored, quantized.format, quantized.global_scale), scale):
        raise ValueError(f"a scale of its weight is none that {quantized.format} can store")
    return stored


def loaded_scale(stored: torch.Tensor, format: str, global_scale: torch.Tensor | None) -> torch.Tensor:
    """fp32, what values are multiplied by."""
    match _kind(format):
        case ScaleKind.FP32:
            return stored
        case ScaleKind.E8M0:
            return power_of_two(stored.to(torch.int32) - _BIAS)
        case ScaleKind.E4M3:
            assert global_scale is not None
            return stored.float() / global_scale


def _kind(format: str) -> ScaleKind:
    return ScaleKind.FP32 if format == "int" else FORMATS[format].scale
