"""Which weights share a scale: a weight seen as one or two views whose second-last axis is one scale's group.

Every granularity is a view `[..., group, inner]`; the scales of a view are its reduction over axis -2. Only
columns that do not divide by `group_size` need a second view, for the shorter last group of each channel. Square blocks
(`per_block`) are the exception: they are copied, with zeros where the last ones reach beyond the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ds_compress.quant.grid import Granularity, WeightGrid

GROUP_AXIS = -2


def check_shape(shape: Sequence[int], grid: WeightGrid) -> None:
    """Raises ValueError where the weight cannot be divided as the grid says."""
    if grid.granularity is Granularity.PER_GROUP and math.prod(shape) % grid.groups:
        raise ValueError(
            f"quantize_groups {grid.groups} does not divide the {math.prod(shape)} weights of shape "
            f"{tuple(shape)}; choose a divisor, or granularity per_channel"
        )
    by_channel = (Granularity.PER_CHANNEL, Granularity.PER_COLUMN_GROUP, Granularity.PER_BLOCK)
    if grid.granularity in by_channel and len(shape) < 2:
        raise ValueError(f"{grid.granularity} needs a weight of 2 or more axes, got {tuple(shape)}")


def scale_shape(shape: Sequence[int], grid: WeightGrid) -> tuple[int, ...]:
    """The shape of a weight's scales, as `QuantizedWeight.scale` and a learned scale have it."""
    channels = shape[grid.channel_axis] if len(shape) > 1 else 1
    match grid.granularity:
        case Granularity.PER_TENSOR:
            return (1,)
        case Granularity.PER_GROUP:
            return (grid.groups,)
        case Granularity.PER_CHANNEL:
            return (channels,)
        case Granularity.PER_COLUMN_GROUP:
            groups = max(1, math.ceil(_columns(shape, grid) / grid.group_size))
            return (groups, channels) if grid.channel_axis else (channels, groups)
        case Granularity.PER_BLOCK:
            return tuple(math.ceil(size / grid.group_size) for size in _matrix_shape(shape))


def split_weight(weight: torch.Tensor, grid: WeightGrid) -> list[torch.Tensor]:
    """Views of a contiguous weight, `[..., group, inner]`; a second one only for shorter last groups."""
    match grid.granularity:
        case Granularity.PER_TENSOR:
            return [weight.view(1, -1, 1)]
        case Granularity.PER_GROUP:
            return [weight.view(grid.groups, weight.numel() // grid.groups, 1)]
        case Granularity.PER_CHANNEL if grid.channel_axis:
            return [weight.unsqueeze(0)]
        case Granularity.PER_CHANNEL:
            return [weight.view(weight.shape[0], _columns(weight.shape, grid), 1)]
        case Granularity.PER_COLUMN_GROUP:
            return _split_columns(weight, grid)
        case Granularity.PER_BLOCK:
            return [_squares(weight.view(_matrix_shape(weight.shape)), grid.group_size)]


def join_weight(blocks: list[torch.Tensor], shape: Sequence[int], grid: WeightGrid) -> torch.Tensor:
    """The inverse of `split_weight`, for blocks that were changed."""
    if grid.granularity is Granularity.PER_BLOCK:
        return _from_squares(blocks[0], _matrix_shape(shape), grid.group_size).view(shape)
    if len(blocks) == 1:
        return blocks[0].view(shape)
    if grid.channel_axis:
        return torch.cat([block.flatten(0, 1) for block in blocks])
    return torch.cat([block.flatten(1) for block in blocks], dim=1).view(shape)


def split_scale(scale: torch.Tensor, shape: Sequence[int], grid: WeightGrid) -> list[torch.Tensor]:
    """Scales of `scale_shape` as tensors that broadcast over the blocks of `split_weight`."""
    match grid.granularity:
        case Granularity.PER_COLUMN_GROUP:
            whole = _columns(shape, grid) // grid.group_size
            axis = 0 if grid.channel_axis else 1
            parts = [scale] if scale.shape[axis] == whole else scale.tensor_split([whole], dim=axis)
            parts = [part for part in parts if part.shape[axis]]
            return [part.unsqueeze(1) if grid.channel_axis else part[:, :, None, None] for part in parts]
        case Granularity.PER_CHANNEL if grid.channel_axis:
            return [scale.view(1, 1, -1)]
        case _:
            return [scale.view(-1, 1, 1)]


def join_scale(blocks: list[torch.Tensor], shape: Sequence[int], grid: WeightGrid) -> torch.Tensor:
    """Reductions of the blocks over `GROUP_AXIS` (kept as size 1) as one tensor of `scale_shape`."""
    joined = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-3)
    return joined.reshape(scale_shape(shape, grid))


def _columns(shape: Sequence[int], grid: WeightGrid) -> int:
    """Inputs of one output channel."""
    return shape[0] if grid.channel_axis else math.prod(shape[1:])


def _split_columns(weight: torch.Tensor, grid: WeightGrid) -> list[torch.Tensor]:
    columns = _columns(weight.shape, grid)
    whole = columns // grid.group_size
    end = whole * grid.group_size
    if grid.channel_axis:
        blocks = [weight[:end].unflatten(0, (whole, grid.group_size))] if whole else []
        return blocks if blocks and end == columns else [*blocks, weight[end:].unsqueeze(0)]
    matrix = weight.view(weight.shape[0], columns)
    blocks = [matrix[:, :end].unflatten(1, (whole, grid.group_size)).unsqueeze(-1)] if whole else []
    return blocks if blocks and end == columns else [*blocks, matrix[:, end:, None].unsqueeze(1)]


def largest_of_squares(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Of a contiguous weight the largest magnitude of each square, `[blocks, 1, 1]` in the order of `split_weight`."""
    rows, columns = _matrix_shape(weight.shape)
    matrix = torch.nn.functional.pad(weight.view(rows, columns), (0, -columns % size, 0, -rows % size))
    squares = matrix.view(matrix.shape[0] // size, size, matrix.shape[1] // size, size)
    # Two reads, and no copy of magnitudes.
    return torch.maximum(squares.amax((1, 3)), squares.amin((1, 3)).neg()).view(-1, 1, 1)


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _squares(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """`[blocks, size * size, 1]`, row after row of blocks."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % size, 0, -rows % size))
    down, across = padded.shape[0] // size, padded.shape[1] // size
    return padded.view(down, size, across, size).transpose(1, 2).reshape(-1, size * size, 1)


def _from_squares(blocks: torch.Tensor, shape: tuple[int, int], size: int) -> torch.Tensor:
    down, across = math.ceil(shape[0] / size), math.ceil(shape[1] / size)
    padded = blocks.view(down, across, size, size).transpose(1, 2).reshape(down * size, across * size)
    return padded[: shape[0], : shape[1]].contiguous()
