"""Which weights share a scale: a weight seen as one or two views whose second-last axis is one scale's group.

Every granularity is a view `[..., group, inner]`; the scales of a view are its reduction over axis -2. Only
columns that do not divide by `group_size` need a second view, for the shorter last group of each channel. Square blocks
(`per_block`) are the exception: they are copied, with zeros where the last ones reach beyond the matrix.

A stack of matrices (`grid.stacked`) is one weight with one view, too: the groups of all its matrices beside each other,
so that what is computed with them takes one pass however many matrices there are. No group reaches into two of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from ds_compress.quant.grid import Granularity, WeightGrid

GROUP_AXIS = -2


def check_shape(shape: Sequence[int], grid: WeightGrid) -> None:
    """Raises ValueError where the weight cannot be divided as the grid says."""
    if grid.stacked:
        return check_shape(shape[1:], of_one_matrix(grid))
    if grid.granularity is Granularity.PER_GROUP and math.prod(shape) % grid.groups:
        raise ValueError(
            f"quantize_groups {grid.groups} does not divide the {math.prod(shape)} weights of shape "
            f"{tuple(shape)}; choose a divisor, or granularity per_channel"
        )
    by_channel = (Granularity.PER_CHANNEL, Granularity.PER_COLUMN_GROUP, Granularity.PER_BLOCK)
    if grid.granularity in by_channel and len(shape) < 2:
        raise ValueError(f"{grid.granularity} needs a weight of 2 or more axes, got {tuple(shape)}")


def of_one_matrix(grid: WeightGrid) -> WeightGrid:
    """The grid of one matrix of a stack."""
    return replace(grid, stacked=False)


def scale_shape(shape: Sequence[int], grid: WeightGrid) -> tuple[int, ...]:
    """The shape of a weight's scales, as `QuantizedWeight.scale` and a learned scale have it.

    Of a stack: that of one matrix behind the number of matrices.
    """
    if grid.stacked:
        return (shape[0], *scale_shape(shape[1:], of_one_matrix(grid)))
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
    if grid.stacked:
        return _split_stack(weight, grid)
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
            return [_squares(weight.view(1, *_matrix_shape(weight.shape)), grid.group_size)]


def join_weight(blocks: list[torch.Tensor], shape: Sequence[int], grid: WeightGrid) -> torch.Tensor:
    """The inverse of `split_weight`, for blocks that were changed."""
    if grid.stacked:
        return _join_stack(blocks, shape, grid)
    if grid.granularity is Granularity.PER_BLOCK:
        return _from_squares(blocks[0], (1, *_matrix_shape(shape)), grid.group_size).view(*shape)
    if len(blocks) == 1:
        return blocks[0].view(shape)
    if grid.channel_axis:
        return torch.cat([block.flatten(0, 1) for block in blocks])
    return torch.cat([block.flatten(1) for block in blocks], dim=1).view(shape)


def split_scale(scale: torch.Tensor, shape: Sequence[int], grid: WeightGrid) -> list[torch.Tensor]:
    """Scales of `scale_shape` as tensors that broadcast over the blocks of `split_weight`."""
    if grid.stacked:
        return _split_stack_scale(scale, shape, grid)
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


def per_matrix(values: torch.Tensor | None, block: torch.Tensor, grid: WeightGrid) -> torch.Tensor | None:
    """One number for each matrix of a stack, in a shape that broadcasts over a block of `split_weight`.

    values: [matrices], or (1,) for all. None, and those of a weight that is no stack: as they are.
    """
    if values is None or not grid.stacked or values.numel() == 1:
        return values
    each = block.shape[0] // values.numel()  # rows, groups or squares of one matrix come one after the other
    return values.repeat_interleave(each).view(-1, *[1] * (block.dim() - 1))


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


def largest_of_squares(weight: torch.Tensor, size: int, stacked: bool = False) -> torch.Tensor:
    """Of a contiguous weight the largest magnitude of each square, `[blocks, 1, 1]` in the order of `split_weight`."""
    matrices = weight if stacked else weight.view(1, *_matrix_shape(weight.shape))
    squares = _padded(matrices, size)
    # Two reads, and no copy of magnitudes.
    return torch.maximum(squares.amax((2, 4)), squares.amin((2, 4)).neg()).view(-1, 1, 1)


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _padded(matrices: torch.Tensor, size: int) -> torch.Tensor:
    """`[matrices, down, size, across, size]`, with zeros beyond the ends of a matrix."""
    _, rows, columns = matrices.shape
    padded = torch.nn.functional.pad(matrices, (0, -columns % size, 0, -rows % size))
    return padded.view(len(matrices), padded.shape[1] // size, size, padded.shape[2] // size, size)


def _squares(matrices: torch.Tensor, size: int) -> torch.Tensor:
    """`[blocks, size * size, 1]`, matrix after matrix, row after row of blocks."""
    return _padded(matrices, size).transpose(2, 3).reshape(-1, size * size, 1)


def _from_squares(blocks: torch.Tensor, shape: tuple[int, int, int], size: int) -> torch.Tensor:
    matrices, rows, columns = shape
    down, across = math.ceil(rows / size), math.ceil(columns / size)
    padded = blocks.view(matrices, down, across, size, size).transpose(2, 3)
    padded = padded.reshape(matrices, down * size, across * size)
    return padded[:, :rows, :columns].contiguous()


def _split_stack(stack: torch.Tensor, grid: WeightGrid) -> list[torch.Tensor]:
    matrices = stack.shape[0]
    match grid.granularity:
        case Granularity.PER_TENSOR | Granularity.PER_GROUP:
            groups = matrices * (grid.groups if grid.granularity is Granularity.PER_GROUP else 1)
            return [stack.view(groups, stack.numel() // groups, 1)]
        case Granularity.PER_BLOCK:
            return [_squares(stack.view(matrices, *_matrix_shape(stack.shape[1:])), grid.group_size)]
        case Granularity.PER_CHANNEL if grid.channel_axis:
            return [stack]
        case Granularity.PER_COLUMN_GROUP if grid.channel_axis:
            whole = stack.shape[1] // grid.group_size
            end = whole * grid.group_size
            blocks = [stack[:, :end].unflatten(1, (whole, grid.group_size))] if whole else []
            return blocks if blocks and end == stack.shape[1] else [*blocks, stack[:, end:].unsqueeze(1)]
        case _:
            return split_weight(stack.view(-1, stack.shape[2]), of_one_matrix(grid))


def _join_stack(blocks: list[torch.Tensor], shape: Sequence[int], grid: WeightGrid) -> torch.Tensor:
    if grid.granularity is Granularity.PER_BLOCK:
        return _from_squares(blocks[0], (shape[0], *_matrix_shape(shape[1:])), grid.group_size).view(*shape)
    if len(blocks) == 1:
        return blocks[0].view(*shape)
    if grid.channel_axis:
        return torch.cat([block.flatten(1, 2) for block in blocks], dim=1)
    return torch.cat([block.flatten(1) for block in blocks], dim=1).view(*shape)


def _split_stack_scale(scale: torch.Tensor, shape: Sequence[int], grid: WeightGrid) -> list[torch.Tensor]:
    match grid.granularity:
        case Granularity.PER_CHANNEL if grid.channel_axis:
            return [scale.unsqueeze(1)]
        case Granularity.PER_COLUMN_GROUP if grid.channel_axis:
            whole = shape[1] // grid.group_size
            parts = [scale] if scale.shape[1] == whole else scale.tensor_split([whole], dim=1)
            return [part.unsqueeze(2) for part in parts if part.shape[1]]
        case Granularity.PER_COLUMN_GROUP:
            rows = (shape[0] * shape[1], shape[2])
            return split_scale(scale.reshape(-1, scale.shape[-1]), rows, of_one_matrix(grid))
        case _:
            return [scale.reshape(-1, 1, 1)]
