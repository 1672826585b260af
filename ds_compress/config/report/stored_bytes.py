"""Bytes of one weight in each format of an export; what `ds_compress.export` writes, in arithmetic.

All formats store scales in fp32 as `[outputs, groups]`, whatever granularity they had in training, and pack the codes
of each output for itself into whole 32-bit words.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ds_compress.config.schema.weight_quantization import WeightQuantizationShared
from ds_compress.config.targets import Target, Weight
from ds_compress.modelinfo.kinds import ModuleKind

if TYPE_CHECKING:
    from ds_compress.config.report.plan import Plan

_FP32, _WORD = 4, 32
_SHAPE_BYTES = 16
_TABLES = ("Embedding",)


def format_of(plan: Plan) -> str:
    """The one that the block names, else the one that an export chooses, "torch" where that has no words."""
    named = plan.config.export_to
    if named is not None:
        return named
    technique = plan.techniques.get("weight_quantization")
    if technique is None:
        return "compressed-tensors" if "activation_quantization" in plan.techniques else "hf"
    kinds = {target.kind for target in technique.targets}
    fits = (
        kinds <= {ModuleKind.LINEAR, ModuleKind.EMBEDDING}
        and technique.shared.quantization_type != "asymmetric"
    )
    return "compressed-tensors" if fits else "torch"


def plain_bytes(weight: Weight, shape: tuple[int, ...], format: str) -> int:
    """Of a parameter that is not quantized."""
    if format == "torch" and weight.owner in _TABLES and len(shape) == 2:
        return math.prod(shape) + _FP32 * shape[0]  # int8, one scale per row
    return math.prod(shape) * (_FP32 if format == "onnx" else weight.itemsize)


def quantized_bytes(
    plan: Plan, weight: Weight, target: Target, shape: tuple[int, ...], format: str, has_zeros: bool
) -> int:
    """Of a weight that is quantized, scales included; `shape` after all cuts."""
    shared: WeightQuantizationShared = plan.techniques["weight_quantization"].shared
    is_float = format == "hf" or (format == "compressed-tensors" and target.kind is ModuleKind.EMBEDDING)
    if is_float:
        return math.prod(shape) * (weight.itemsize if format == "hf" else _FP32)
    rows, columns = _matrix(target.kind, shape)
    groups = _groups(target, shared, rows, columns)
    bits = target.params.target_bits
    if bits == 1 and (has_zeros or format != "torch"):
        bits = 2  # for -1, 0 and 1
    has_offset = shared.quantization_type == "asymmetric" and bits > 2
    scales = _FP32 * rows * groups
    if format == "onnx":
        bits = 4 if bits <= 4 else 8
        return -(-rows * columns * bits // 8) + scales + (rows * groups * bits // 8 if has_offset else 0)
    packs = bits < 8 and (format == "torch" or plan.packs)
    codes = rows * -(-columns * bits // _WORD) * (_WORD // 8) if packs else rows * columns
    extra = _SHAPE_BYTES if format == "compressed-tensors" and packs else 0
    return codes + scales * (2 if has_offset else 1) + extra


def _matrix(kind: ModuleKind, shape: tuple[int, ...]) -> tuple[int, int]:
    if kind is ModuleKind.CONV1D:
        return shape[1], shape[0]
    return shape[0], math.prod(shape[1:])


def _groups(target: Target, shared: WeightQuantizationShared, rows: int, columns: int) -> int:
    """Scales of one output."""
    match shared.granularity:
        case None | "per_group" if target.kind is ModuleKind.EMBEDDING:
            return 1
        case None | "per_group":
            if target.kind is ModuleKind.CONV1D:
                return shared.quantize_groups
            return max(1, shared.quantize_groups // rows)
        case "per_tensor" | "per_channel":
            return 1
        case _:
            return math.ceil(columns / shared.effective_group_size)
