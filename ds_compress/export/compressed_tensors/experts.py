"""Experts in compressed-tensors: each matrix by the name that it has on the hub, as a layer of its own.

transformers 5.24 dequantizes experts while it loads them and fuses the result; it does not quantize their inputs. What
it reads wrongly, or not at all, is refused here, each with what its `CompressedTensorsDequantize` does:

    int8 with integer inputs   looks for `weight_packed` only; int-quantized has none, and the load fails
    mxfp8                      multiplies codes by the exponents of their scales, as if these were scales
    nvfp4                      hands on no global scale: loads without an error, with other values
    fp8 in square blocks       multiplies by the scales of blocks without repeating them: fails beyond one block
    static inputs              has no place for their scales: unexpected keys
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ds_compress.export.hub_names import Converter, expert_rows
from ds_compress.export.quantized_experts import QuantizedExperts, rows_of
from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.read import InputScheme, Layer
from ds_compress.modelinfo.kinds import ModuleKind
from ds_compress.quant.grid import Granularity

FUSED_ON_HUB = (
    "its experts are fused on the hub, too, and compressed-tensors has no name for one matrix of them; "
    'format="torch" stores them quantized, format="hf" their values'
)
_MISREAD = {
    "mxfp8": "transformers 5.24 does not load MXFP8 experts (it takes the exponents of their scales for scales)",
    "nvfp4": "transformers 5.24 loads NVFP4 experts without their global scale, with wrong values and no error",
}
_INT8 = "transformers 5.24 does not load experts of 8-bit integers with integer inputs (it looks for packed weights)"
_BLOCKS = (
    "transformers 5.24 does not load experts in FP8 with square blocks (it does not repeat their scales)"
)
_STATIC = "transformers 5.24 has no place for the static input scales of experts"
_EVERY_EXPERT = r"re:.*\.experts\.\d+\..*"
INSTEAD = 'FP8_DYNAMIC, W4A16, W4AFP8, MXFP4 and MXFP6A16 are read right, and format="torch" stores it'


def misread(format: str, bits: int, in_blocks: bool, integer_inputs: bool, static_inputs: bool) -> str | None:
    """Why stock transformers does not read experts of this number format right; None where it does.

    in_blocks: more than one square block of a matrix has a scale.
    """
    if format in _MISREAD:
        return _MISREAD[format]
    if format == "int" and bits == 8 and integer_inputs:
        return _INT8
    if format != "int" and in_blocks:
        return _BLOCKS
    return _STATIC if static_inputs else None


def misread_matrix(matrix: QuantizedMatrix, layer: Layer, name: str) -> str | None:
    """`misread` of a matrix of the stack `name`."""
    used = layer.expert_inputs.get(name)
    in_blocks = matrix.granularity is Granularity.PER_BLOCK and matrix.scale.numel() > 1
    integers = used is not None and used.grid.format == "int"
    return misread(matrix.format, matrix.bits, in_blocks, integers, used is not None and used.grid.static)


def single_matrices(
    layer: Layer, name: str, experts: QuantizedExperts, converter: Converter
) -> Iterator[tuple[str, QuantizedMatrix, InputScheme | None]]:
    """(name of the module on the hub, matrix, how its input is quantized, without a range), of one stack of a layer.

    Raises:
        ValueError: the hub has them fused; a scale belongs to parts of two matrices.
    """
    assert layer.kind is not None
    outputs = 2 if layer.kind is ModuleKind.TRANSPOSED_EXPERTS else 1
    found = expert_rows(converter, layer.full(name), experts.shape, outputs)
    if not found:
        raise ValueError(FUSED_ON_HUB)
    for stored, (expert, rows) in found.items():
        if bool((rows[1:] < rows[:-1]).any()):
            raise ValueError(f"{stored} has its outputs in another order")
        matrix = rows_of(experts.matrices[expert], rows)
        yield stored.removesuffix(".weight"), matrix, layer.expert_inputs.get(name)


def has_single_matrices(converter: Converter, name: str, shape: tuple[int, ...], kind: ModuleKind) -> bool:
    """Whether a checkpoint on the hub has each expert's matrices of this stack for themselves."""
    return bool(expert_rows(converter, name, shape, 2 if kind is ModuleKind.TRANSPOSED_EXPERTS else 1))


def targets_of(names: list[str]) -> list[str]:
    """Targets of a config group: one regex for all experts, by which transformers finds their group."""
    single = [name for name in names if not is_of_expert(name)]
    return single if len(single) == len(names) else [*single, _EVERY_EXPERT]


def is_of_expert(name: str) -> bool:
    """Whether a module of this name on the hub is a matrix of one expert."""
    return re.fullmatch(_EVERY_EXPERT.removeprefix("re:"), name) is not None
