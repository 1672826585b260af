"""Scales that stay as they are chosen at the start: the largest value's, or those with the least squared error."""

from __future__ import annotations

import torch

from ds_compress.ops.reference.float_formats import ScaleKind
from ds_compress.quant.arithmetic import dequantize_, quantize_block, working_dtype
from ds_compress.quant.grid import WeightGrid
from ds_compress.quant.layout import GROUP_AXIS, join_scale, per_matrix, split_weight
from ds_compress.quant.qparams import QParams, stored_scale
from ds_compress.quant.weights import choose_weight_qparams, own_global_scale

# What the scale of the largest value is multiplied by. With 1.5 a block of E2M1 has its largest value at 4 instead of
# 6, where steps are finer (Cook et al. 2025, "Four over six"); below 1 the largest values saturate.
_FACTORS = (1.0, 1.5, 0.9, 0.8, 0.7, 0.6)
_POWERS = (1.0, 2.0, 0.5)


def largest_scale(
    weight: torch.Tensor, grid: WeightGrid, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """fp32 or fp64 of `layout.scale_shape`: the scales that are chosen from the weight as it is."""
    chosen = choose_weight_qparams(weight, grid, global_scale)
    return join_scale([q.scale for q in chosen], weight.shape, grid)


def searched_scale(
    weight: torch.Tensor, grid: WeightGrid, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Of some candidates for each group the scale with which the group's squared error is least.

    fp32 or fp64 of `layout.scale_shape`, scales that the format can store. Of equal errors the first candidate's, which
    is the scale of the largest value.
    """
    if grid.has_global_scale and global_scale is None:
        global_scale = own_global_scale(weight, grid)
    exact = weight.to(working_dtype(weight)).contiguous()
    known = grid.number_format
    factors = _POWERS if known is not None and known.scale is ScaleKind.E8M0 else _FACTORS
    found = []
    chosen = choose_weight_qparams(weight, grid, global_scale)
    for block, largest in zip(split_weight(exact, grid), chosen, strict=True):
        best = least = None
        shared = per_matrix(global_scale, block, grid)
        for factor in factors:
            scale = stored_scale(largest.scale * factor, grid, shared)
            qparams = QParams(scale)
            error = dequantize_(quantize_block(block, qparams, grid), qparams).sub_(block).square_()
            total = error.sum(GROUP_AXIS, keepdim=True)
            if best is None or least is None:
                best, least = scale, total
            else:
                better = total < least
                best, least = torch.where(better, scale, best), torch.where(better, total, least)
        assert best is not None
        found.append(best)
    return join_scale(found, weight.shape, grid)
