"""Bytes of one weight in each format of an export; what `ds_compress.export` writes, in arithmetic.

All formats store scales in fp32 as `[outputs, groups]`, whatever granularity they had in training, and pack the
quantized values of each output for itself into whole 32-bit words.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ds_compress.config.schema.block import WeightSize
from ds_compress.config.targets import Target, Weight
from ds_compress.modelinfo.kinds import ModuleKind

_FP32, _WORD = 4, 32
_SHAPE_BYTES = 16
_TABLES = ("Embedding",)
_GRAPHS = ("onnx", "openvino")


def plain_bytes(weight: Weight, shape: tuple[int, ...], format: str) -> int:
    """Of a parameter that is not quantized."""
    if format in ("torch", *_GRAPHS) and weight.owner in _TABLES and len(shape) == 2:
        return math.prod(shape) + _FP32 * shape[0]  # int8, one scale per row
    return math.prod(shape) * (_FP32 if format in _GRAPHS else weight.itemsize)


def quantized(size: WeightSize, target: Target, shared: Any, format: str, packs: bool) -> WeightSize:
    """The size of a weight that is quantized, scales included; `shared`: of the block that does."""
    per_scale = _FP32 * (2 if shared.quantization_type == "asymmetric" else 1)
    cut = replace(target, shape=size.shape)
    known = target.params.number_format
    if known is not None:
        per_scale = known.scale_bits // 8
    stored = _bytes(size, cut, shared, format, packs)
    # A tied weight that only one of its users quantizes is stored for the other, too.
    total = stored + (size.bytes if size.users > 1 else 0)
    bits, scales = target.params.final_bits, per_scale * scales_of(cut, shared)
    return size.with_(bits=bits, scale_bytes=scales, bytes=total)


def _bytes(size: WeightSize, target: Target, shared: Any, format: str, packs: bool) -> int:
    if target.kind.is_experts:
        count = target.matrices
        of_one = size.with_(shape=size.shape[1:], numel=size.numel // count)
        return count * _bytes(of_one, _of_one_expert(target), shared, format, packs)
    itemsize = size.bits // 8
    if format == "hf" or (format == "compressed-tensors" and target.kind is ModuleKind.EMBEDDING):
        return size.numel * (itemsize if format == "hf" else _FP32)
    rows, columns = _matrix(target.kind, size.shape)
    if (known := target.params.number_format) is not None:
        scales = scales_of(target, shared) * known.scale_bits // 8
        return -(-rows * columns * known.bits // 8) + scales + (_FP32 if known.has_global_scale else 0)
    groups = _groups(target, shared, rows, columns)
    bits = target.params.final_bits
    if bits == 1 and (size.is_sparse or format != "torch"):
        bits = 2  # for -1, 0 and 1
    has_offset = shared.quantization_type == "asymmetric" and bits > 2
    scales = _FP32 * rows * groups
    if format in _GRAPHS:
        bits = 4 if bits <= 4 else 8
        return -(-rows * columns * bits // 8) + scales + (rows * groups * bits // 8 if has_offset else 0)
    is_packed = bits < 8 and (format == "torch" or packs)
    values = rows * -(-columns * bits // _WORD) * (_WORD // 8) if is_packed else rows * columns
    extra = _SHAPE_BYTES if format == "compressed-tensors" and is_packed else 0
    return values + scales * (2 if has_offset else 1) + extra


def scales_of(target: Target, shared: Any) -> int:
    """How many scales one weight has."""
    if target.kind.is_experts:
        return target.matrices * scales_of(_of_one_expert(target), shared)
    outputs = target.shape[1] if target.kind is ModuleKind.CONV1D else target.shape[0]
    match shared.granularity_of(target.params):
        case None | "per_group" if target.kind is ModuleKind.EMBEDDING:
            return target.shape[0]
        case None | "per_group":
            return shared.quantize_groups
        case "per_tensor":
            return 1
        case "per_channel":
            return outputs
        case granularity:
            inputs, size = math.prod(target.shape) // outputs, shared.group_size_of(target.params)
            rows = math.ceil(outputs / size) if granularity == "per_block" else outputs
            return rows * math.ceil(inputs / size)


def _of_one_expert(target: Target) -> Target:
    kind = ModuleKind.CONV1D if target.kind.is_transposed else ModuleKind.LINEAR
    return replace(target, kind=kind, shape=target.shape[1:])


def _matrix(kind: ModuleKind, shape: tuple[int, ...]) -> tuple[int, int]:
    if kind is ModuleKind.CONV1D:
        return shape[1], shape[0]
    return shape[0], math.prod(shape[1:])


def _groups(target: Target, shared: Any, rows: int, columns: int) -> int:
    """Scales of one output."""
    match shared.granularity_of(target.params):
        case None | "per_group" if target.kind is ModuleKind.EMBEDDING:
            return 1
        case None | "per_group":
            if target.kind is ModuleKind.CONV1D:
                return shared.quantize_groups
            return max(1, shared.quantize_groups // rows)
        case "per_tensor" | "per_channel":
            return 1
        case _:
            return math.ceil(columns / shared.group_size_of(target.params))
