"""Experts in compressed-tensors: each matrix by the name that it has on the hub, as a layer of its own.

transformers 5.24 dequantizes experts while it loads them and fuses the result; it does not quantize their inputs. What
it reads wrongly, or not at all, is refused here, each with what its `CompressedTensorsDequantize` does:

    int8 with integer inputs   looks for `weight_packed` only; int-quantized has none, and the load fails
    mxfp8                      multiplies codes by the exponents of their scales, as if these were scales
    nvfp4                      hands on no global scale: loads without an error, with other values
    fp8 in square blocks       multiplies by the scales of blocks without repeating them: fails beyond one block
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

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
_EVERY_EXPERT = r"re:.*\.experts\.\d+\..*"
INSTEAD = 'FP8_DYNAMIC, W4A16, W4AFP8, MXFP4 and MXFP6A16 are read right, and format="torch" stores it'


def misread(format: str, bits: int, in_blocks: bool, integer_inputs: bool) -> str | None:
    """Why stock transformers does not read experts of this number format right; None where it does.

    in_blocks: more than one square block of a matrix has a scale.
    """
    if format in _MISREAD:
        return _MISREAD[format]
    if format == "int":
        return _INT8 if bits == 8 and integer_inputs else None
    return _BLOCKS if in_blocks else None


def misread_matrix(matrix: QuantizedMatrix, layer: Layer, name: str) -> str | None:
    """`misread` of a matrix of the stack `name`."""
    used = layer.expert_inputs.get(name)
    in_blocks = matrix.granularity is Granularity.PER_BLOCK and matrix.scale.numel() > 1
    return misread(matrix.format, matrix.bits, in_blocks, used is not None and used.grid.format == "int")


def single_matrices(
    layer: Layer, name: str, experts: QuantizedExperts, converter: Converter
) -> Iterator[tuple[str, QuantizedMatrix, InputScheme | None]]:
    """(name of the module on the hub, matrix, how its input is quantized), of one stack of a layer.

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
        yield stored.removesuffix(".weight"), matrix, input_of(layer, name, expert)


def input_of(layer: Layer, name: str, expert: int) -> InputScheme | None:
    """How the input of one expert's matrix is quantized: a static range is its own."""
    used = layer.expert_inputs.get(name)
    if used is None or used.input_range is None:
        return used
    own = used.input_range[expert]
    if not bool(own.isfinite().all()):
        raise ValueError(
            f"the input of expert {expert} has no range: it saw no token while ranges were observed"
        )
    return replace(used, input_range=own)


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
