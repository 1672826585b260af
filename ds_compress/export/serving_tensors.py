"""What format `torch` stores of a quantized weight, and how that is read back; `serving_format` says where it lies."""

from __future__ import annotations

from typing import Any

import torch

from ds_compress.export.quantized_matrix import QuantizedMatrix

_BYTE = 8
PLAIN_VALUES = "weight_values"
INSTEAD_OF_WEIGHT = ("weight_codes", "weight_packed", PLAIN_VALUES)
"""Beside which `weight` is empty."""


def stored_weight(quantized: QuantizedMatrix) -> dict[str, torch.Tensor]:
    """`loaded_weight` reads it back."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    stored = {"weight_scale": quantized.scale}
    if quantized.offset is not None:
        stored["weight_offset"] = quantized.offset
    if quantized.bits == _BYTE:
        return {**stored, "weight_codes": quantized.values}
    values, bits = quantized.values, quantized.bits
    if bits == 1:  # -1 and 1 as -1 and 0, which one bit holds
        values = values.clamp_max(0)
    if quantized.offset is not None:  # packing is for signed integers
        values = (values.to(torch.int16) - 2 ** (quantized.bits - 1)).to(torch.int8)
    return {**stored, "weight_packed": pack_to_int32(values, bits)}


def loaded_weight(stored: dict[str, torch.Tensor], scheme: dict[str, Any]) -> QuantizedMatrix:
    """The weight from its tensors by local name, and the "weight" entry of its scheme."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape, transposed, scale = tuple(scheme["shape"]), scheme["transposed"], stored["weight_scale"]
    offset = stored.get("weight_offset")
    if "weight_codes" in stored:
        values = stored["weight_codes"]
    else:
        columns = shape[0] if transposed else torch.Size(shape[1:]).numel()
        values = unpack_from_int32(
            stored["weight_packed"], scheme["bits"], torch.Size((scale.shape[0], columns))
        )
        if scheme["bits"] == 1:
            values = 2 * values + 1
        if offset is not None:
            values = (values.to(torch.int16) + 2 ** (scheme["bits"] - 1)).to(torch.uint8)
    return QuantizedMatrix(values, scale, offset, scheme["bits"], scheme["group_size"], shape, transposed)
