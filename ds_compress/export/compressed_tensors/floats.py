"""Weights of floats as compressed-tensors stores them; bits and scales are those of training.

float-quantized        fp8_e4m3: `weight` float8_e4m3fn; fp32 scales of a tensor, channels or square blocks
mxfp8-quantized        `weight` float8_e4m3fn; scales uint8, the exponent plus 127, as in all mx formats
mxfp6-pack-quantized   `weight_packed` uint8, four numbers in three bytes
mxfp4-pack-quantized   `weight_packed` uint8, two numbers in a byte
nvfp4-pack-quantized   the same; scales float8_e4m3fn, fp32 `weight_global_scale`
"""

from __future__ import annotations

from typing import Any

import torch

from ds_compress.export.compressed_tensors.arguments import arguments, strategy_of_groups
from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.scales import stored_scale
from ds_compress.ops.reference.float_formats import ScaleKind
from ds_compress.quant.formats import FORMATS
from ds_compress.quant.grid import Granularity

COMPRESSORS = {
    "fp8_e4m3": "float-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp6_e2m3": "mxfp6-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
"""By the number format, those that there is a way to store."""

PACKED = ("mxfp6_e2m3", "mxfp4", "nvfp4")

_STRATEGIES = {
    Granularity.PER_TENSOR: "tensor",
    Granularity.PER_CHANNEL: "channel",
    Granularity.PER_BLOCK: "block",
}


def in_16_bits(format: str) -> bool:
    """Whether compressed-tensors 0.20 decompresses it to bfloat16 whatever the model's dtype is."""
    known = FORMATS.get(format)
    return known is not None and known.scale is not ScaleKind.FP32


def weight_arguments(quantized: QuantizedMatrix) -> dict[str, Any]:
    """Raises ValueError where there is no way to store it, with the reason."""
    known = FORMATS[quantized.format]
    if quantized.format not in COMPRESSORS:
        raise ValueError(
            f"compressed-tensors 0.20 has no {quantized.format} (of floats: {', '.join(COMPRESSORS)})"
        )
    if known.block is not None and (
        quantized.granularity is not Granularity.PER_COLUMN_GROUP or quantized.group_size != known.block
    ):
        raise ValueError(f"{quantized.format} is stored with a scale for each {known.block} inputs")
    columns = quantized.values.shape[1]
    in_groups = quantized.granularity in (Granularity.PER_COLUMN_GROUP, Granularity.PER_BLOCK)
    if in_groups and columns % quantized.group_size:
        raise ValueError(
            f"its {columns} columns are no multiple of the {quantized.group_size} that share a scale"
        )
    return arguments(
        known.bits,
        _STRATEGIES.get(quantized.granularity) or strategy_of_groups(known),
        format=quantized.format,
        group_size=quantized.group_size if in_groups else None,
    )


def stored_floats(quantized: QuantizedMatrix) -> dict[str, torch.Tensor]:
    """By local name. Raises ValueError where a scale is none that the format can store."""
    scale = stored_scale(quantized)
    stored = {"weight_scale": scale.view(1) if quantized.granularity is Granularity.PER_TENSOR else scale}
    if quantized.global_scale is not None:
        stored["weight_global_scale"] = quantized.global_scale
    if quantized.format not in PACKED:
        return {**stored, "weight": quantized.values.view(torch.float8_e4m3fn)}
    return {**stored, "weight_packed": _packed(quantized)}


def _packed(quantized: QuantizedMatrix) -> torch.Tensor:
    from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    pack: Any = pack_fp6_to_uint8 if quantized.bits == 6 else pack_fp4_to_uint8
    packed: torch.Tensor = pack(quantized.numbers())
    return packed
