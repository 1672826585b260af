"""Which products the integer kernels compute as training did: those of one layer and of experts alike."""

from __future__ import annotations

from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.read import InputScheme
from ds_compress.quant.grid import TokenGranularity

_ALIGNED_GROUP = 32


def misfit(quantized: QuantizedMatrix, used: InputScheme | None) -> str | None:
    """Why no kernel multiplies such inputs by this weight; None where one does."""
    if used is None:
        return "inputs are not quantized"
    if quantized.format != "int":
        return f"weights are {quantized.format}"
    grid = used.grid
    if grid.format != "int" or grid.bits != 8 or not grid.symmetric:
        return f"inputs are {grid.describe()}, not symmetric int8"
    if grid.granularity is TokenGranularity.PER_SAMPLE or not (
        grid.static or grid.granularity is TokenGranularity.PER_TOKEN
    ):
        return f"inputs have a range {grid.granularity.value} that is not static"
    if quantized.offset is not None:
        return "weights are asymmetric"
    if quantized.groups > 1 and quantized.bits > 4:
        return f"weights have {quantized.bits} bits in groups"
    if takes_groups(quantized) and quantized.group_size % _ALIGNED_GROUP:
        return f"weights are in groups of {quantized.group_size}, no multiple of {_ALIGNED_GROUP}"
    return None


def takes_groups(quantized: QuantizedMatrix) -> bool:
    """Whether it is for the int4 kernels, which have a scale for each group of columns; the others are int8."""
    return quantized.groups > 1
