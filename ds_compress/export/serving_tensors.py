"""What format `torch` stores of a quantized weight, and how that is read back; `serving_format` says where it lies.

Codes of floats are packed like unsigned integers, and their scales take 8 bits where the format says so (see `scales`).
`with_container` puts the codes of a weight with many zeros into a container, where that is smaller.
"""

from __future__ import annotations

from typing import Any

import torch

from ds_compress.export.quantized_experts import QuantizedExperts
from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.scales import loaded_scale, stored_scale
from ds_compress.export.sparse_container import packed, sparse_name
from ds_compress.quant.grid import Granularity

_BYTE = 8
CODES, PACKED = "weight_codes", "weight_packed"
PLAIN_VALUES = "weight_values"
INSTEAD_OF_WEIGHT = (CODES, PACKED, PLAIN_VALUES)
"""Beside which `weight` is empty."""


def weight_scheme(quantized: QuantizedMatrix) -> dict[str, Any]:
    """JSON of how it is stored, for `loaded_weight`. Integers have no "format", as before there were floats."""
    scheme: dict[str, Any] = {
        "bits": quantized.bits,
        "group_size": quantized.group_size,
        "shape": list(quantized.shape),
        "transposed": quantized.transposed,
    }
    if quantized.format != "int":
        scheme |= {"format": quantized.format, "granularity": quantized.granularity.value}
    return scheme


def stored_weight(quantized: QuantizedMatrix) -> dict[str, torch.Tensor]:
    """`loaded_weight` reads it back.

    Raises:
        ValueError: a scale is none that the number format can store.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    stored = {"weight_scale": stored_scale(quantized)}
    if quantized.offset is not None:
        stored["weight_offset"] = quantized.offset
    if quantized.global_scale is not None:
        stored["weight_global_scale"] = quantized.global_scale
    if quantized.bits == _BYTE:
        return {**stored, CODES: quantized.values}
    values, bits = quantized.values, quantized.bits
    if bits == 1:  # -1 and 1 as -1 and 0, which one bit holds
        values = values.clamp_max(0)
    if _is_unsigned(quantized.format, quantized.offset):  # packing is for signed integers
        values = (values.to(torch.int16) - 2 ** (quantized.bits - 1)).to(torch.int8)
    return {**stored, PACKED: pack_to_int32(values, bits)}


def with_container(
    stored: dict[str, torch.Tensor], codes: torch.Tensor, name: str = ""
) -> dict[str, torch.Tensor]:
    """`stored` with a container of its `codes` in place of them, where that is smaller; name: before that of each.

    `load.Stored` unpacks it: `loaded_weight` and `loaded_experts` see the codes.
    """
    dense = name + (CODES if name + CODES in stored else PACKED)
    container = packed(codes, stored[dense].nbytes)
    if container is None:
        return stored
    rest = {key: tensor for key, tensor in stored.items() if key != dense}
    return {**rest, sparse_name(name + CODES): container}


def loaded_weight(stored: dict[str, torch.Tensor], scheme: dict[str, Any]) -> QuantizedMatrix:
    """The weight from its tensors by local name, and the "weight" entry of its scheme.

    Raises:
        ValueError: its codes have another shape than the scheme says.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape, transposed = tuple(scheme["shape"]), scheme["transposed"]
    offset, format = stored.get("weight_offset"), scheme.get("format", "int")
    global_scale = stored.get("weight_global_scale")
    columns = shape[0] if transposed else torch.Size(shape[1:]).numel()
    rows = torch.Size(shape).numel() // max(1, columns)
    if CODES in stored:
        values = stored[CODES]
        if tuple(values.shape) != (rows, columns):
            raise ValueError(f"{CODES} is {tuple(values.shape)}, and {(rows, columns)} is expected")
    else:
        values = unpack_from_int32(stored[PACKED], scheme["bits"], torch.Size((rows, columns)))
        if scheme["bits"] == 1:
            values = 2 * values + 1
        if _is_unsigned(format, offset):
            values = (values.to(torch.int16) + 2 ** (scheme["bits"] - 1)).to(torch.uint8)
    return QuantizedMatrix(
        values,
        loaded_scale(stored["weight_scale"], format, global_scale),
        offset,
        scheme["bits"],
        scheme["group_size"],
        shape,
        transposed,
        format,
        Granularity(scheme.get("granularity", Granularity.PER_COLUMN_GROUP)),
        global_scale,
    )


def stored_experts(name: str, experts: QuantizedExperts) -> dict[str, torch.Tensor]:
    """The tensors of all matrices of the stack `name`, stacked; `loaded_experts` reads them back.

    Raises:
        ValueError: a scale is none that the number format can store.
    """
    each = [stored_weight(matrix) for matrix in experts.matrices]
    return {f"{name}_{key}": torch.stack([stored[key] for stored in each]) for key in each[0]}


def loaded_experts(name: str, stored: dict[str, torch.Tensor], scheme: dict[str, Any]) -> QuantizedExperts:
    """The stack `name` from the tensors of its module, and its entry in "experts" of the scheme."""
    prefix = f"{name}_"
    own = {key.removeprefix(prefix): t for key, t in stored.items() if key.startswith(f"{prefix}weight_")}
    return QuantizedExperts(
        tuple(
            loaded_weight({key: tensor[expert] for key, tensor in own.items()}, scheme)
            for expert in range(scheme["experts"])
        )
    )


def _is_unsigned(format: str, offset: torch.Tensor | None) -> bool:
    return format != "int" or offset is not None
