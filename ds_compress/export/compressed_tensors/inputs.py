"""Quantized inputs as compressed-tensors says them: how, and the scales of static ranges."""

from __future__ import annotations

from typing import Any

import torch

from ds_compress.export.compressed_tensors.arguments import arguments, strategy_of_groups
from ds_compress.export.loaded_tensors import input_scale
from ds_compress.export.read import InputScheme
from ds_compress.quant.formats import FORMATS
from ds_compress.quant.grid import ActivationGrid, TokenGranularity
from ds_compress.quant.qparams import qparams_from_range

FLOATS = ("fp8_e4m3", "mxfp8", "mxfp6_e2m3", "mxfp4", "nvfp4")
_STRATEGIES = {TokenGranularity.PER_TOKEN: "token", TokenGranularity.PER_TENSOR: "tensor"}


def input_arguments(used: InputScheme, columns: int) -> dict[str, Any]:
    """columns: of the layer's input. Raises ValueError where there is no way to say it, with the reason."""
    grid = used.grid
    if grid.format == "int":
        per_token = grid.granularity is TokenGranularity.PER_TOKEN
        strategy = "token" if per_token and not grid.static else "tensor"
        return arguments(grid.bits, strategy, dynamic=not grid.static, symmetric=grid.symmetric)
    _check_floats(grid, columns)
    known = FORMATS[grid.format]
    if grid.granularity is TokenGranularity.PER_TOKEN_GROUP:
        dynamic = "local" if known.has_global_scale else True
        strategy = strategy_of_groups(known)
        return arguments(grid.bits, strategy, format=grid.format, group_size=grid.group_size, dynamic=dynamic)
    strategy = "tensor" if grid.static else _STRATEGIES[grid.granularity]
    return arguments(grid.bits, strategy, format=grid.format, dynamic=not grid.static)


def _check_floats(grid: ActivationGrid, columns: int) -> None:
    known = FORMATS[grid.format]
    in_groups = grid.granularity is TokenGranularity.PER_TOKEN_GROUP
    if grid.format not in FLOATS:
        raise ValueError(
            f"its inputs are {grid.format}, and compressed-tensors 0.20 has of floats {', '.join(FLOATS)}"
        )
    if grid.granularity is TokenGranularity.PER_SAMPLE:
        raise ValueError(f"its inputs are {grid.describe()}, which compressed-tensors has no word for")
    if known.block is not None and (not in_groups or grid.group_size != known.block):
        raise ValueError(f"inputs in {grid.format} have a scale for each {known.block} neighbours")
    if known.has_global_scale and not grid.static:
        raise ValueError(
            f"its inputs are {grid.format} with a global scale of each batch, and what loads it needs one observed "
            'scale: train with "range_calibration": "static"'
        )
    if grid.static and in_groups and not known.has_global_scale:
        raise ValueError(f"its inputs are {grid.describe()}: groups have no static range")
    if in_groups and columns % grid.group_size:
        raise ValueError(f"its {columns} inputs are no multiple of the {grid.group_size} that share a scale")


def stored_inputs(used: InputScheme) -> dict[str, torch.Tensor]:
    """By local name; nothing for dynamic ranges.

    Raises:
        ValueError: the range does not contain 0.
    """
    grid = used.grid
    if used.input_range is None:
        return {}
    if grid.has_global_scale:
        scale = input_scale(used)
        assert scale is not None
        return {"input_global_scale": scale}
    qparams = qparams_from_range(used.input_range[0], used.input_range[1], grid)
    stored = {"input_scale": qparams.scale.reshape(1)}
    if qparams.offset is not None:
        half = 2 ** (grid.bits - 1)
        zero = -torch.round(qparams.offset / qparams.scale) - half
        if not -half <= float(zero) < half:
            raise ValueError(
                f"the range of its input, {used.input_range.tolist()}, does not contain 0, which an int8 zero point "
                "needs"
            )
        stored["input_zero_point"] = zero.to(torch.int8).reshape(1)
    return stored
