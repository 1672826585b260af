"""Grids and layouts that the tests go through, and the formulas written out plainly."""

from __future__ import annotations

import math

import torch

from ds_compress.quant.grid import Granularity, WeightGrid


def formula(row: list[float], grid: WeightGrid) -> list[float]:
    """One group through the formulas of the removed library (narrow: ours), in Python's float64."""
    bits, largest = grid.bits, max(abs(v) for v in row)
    if bits == 1 and not grid.learned:
        mean = sum(abs(v) for v in row) / len(row)
        return [math.copysign(mean, v) if v else 0.0 for v in row]
    if bits == 2 and not grid.learned:
        threshold = 0.7 * sum(abs(v) for v in row) / len(row)
        kept = [abs(v) for v in row if abs(v) > threshold]
        alpha = sum(kept) / len(kept) if kept else 0.0
        return [math.copysign(alpha, v) if abs(v) > threshold else 0.0 for v in row]
    if grid.symmetric:
        half = 2 ** (bits - 1)
        scale = largest / (half - 1) if grid.narrow_range else 2 * largest / 2**bits
        if scale == 0:
            return [0.0] * len(row)
        low = -half + 1 if grid.narrow_range else -half
        return [min(max(round(v / scale), low), half - 1) * scale for v in row]
    scale = (max(row) - min(row)) / (2**bits - 1 if grid.narrow_range else 2**bits)
    if scale == 0:
        return row
    zero = round(min(row) / scale) * scale
    return [min(max(round((v - zero) / scale), 0), 2**bits - 1) * scale + zero for v in row]


def groups_of(weight: torch.Tensor, grid: WeightGrid) -> list[torch.Tensor]:
    """Index sets of the groups, by plain slicing that shares nothing with the library."""
    index = torch.arange(weight.numel()).view(weight.shape)
    match grid.granularity:
        case Granularity.PER_TENSOR:
            return [index.flatten()]
        case Granularity.PER_GROUP:
            return list(index.flatten().chunk(grid.groups))
    channels = [index.select(grid.channel_axis, i).flatten() for i in range(weight.shape[grid.channel_axis])]
    if grid.granularity is Granularity.PER_CHANNEL:
        return channels
    return [part for channel in channels for part in channel.split(grid.group_size)]


UNIFORM = [(b, s, n) for b in (3, 4, 8) for s in (True, False) for n in (True, False)]


LEVELS = [(1, True, False), (2, True, False), *UNIFORM]


LAYOUTS = [
    {"granularity": Granularity.PER_TENSOR},
    {"granularity": Granularity.PER_GROUP, "groups": 5},
    {"granularity": Granularity.PER_CHANNEL},
    {"granularity": Granularity.PER_CHANNEL, "channel_axis": 1},
    {"granularity": Granularity.PER_COLUMN_GROUP, "group_size": 4},
    {"granularity": Granularity.PER_COLUMN_GROUP, "group_size": 4, "channel_axis": 1},
    {"granularity": Granularity.PER_COLUMN_GROUP, "group_size": 1000},
]


def make_grid(levels: tuple[int, bool, bool], layout: dict) -> WeightGrid:
    bits, symmetric, narrow = levels
    return WeightGrid(bits=bits, symmetric=symmetric, narrow_range=narrow, **layout)
