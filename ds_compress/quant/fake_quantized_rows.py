"""Rows of an activation, fake-quantized by themselves or with a range for each; the inputs of experts.

What multiplies them keeps the quantized rows for backward, as it would keep the others. For their own gradient one bit
for each value is kept, which says whether it clipped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ds_compress.ops import bitmask
from ds_compress.ops.reference.float_formats import global_scale_of
from ds_compress.quant.arithmetic import normalize, working_dtype
from ds_compress.quant.fake_quant import fake_quantize_input, in_groups
from ds_compress.quant.gradients import straight_through
from ds_compress.quant.grid import ActivationGrid, TokenGranularity
from ds_compress.quant.qparams import QParams, choose_qparams, qparams_from_range


def fake_quantized_rows(
    x: torch.Tensor,
    grid: ActivationGrid,
    lowest: torch.Tensor | None = None,
    highest: torch.Tensor | None = None,
) -> torch.Tensor:
    """Q(x) in its dtype, with a straight-through gradient that is zero where a value clips.

    Args:
        x: [..., features].
        lowest, highest: fp32 [..., 1] or (1,), the range of each row, where it is not that of its own values (of nvfp4:
            for the global scale). NaN: the row passes as it is. Inf: it becomes NaN.
    """
    values: torch.Tensor = _FakeQuantizedRows.apply(x, grid, lowest, highest)
    return values


class _FakeQuantizedRows(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        grid: ActivationGrid,
        lowest: torch.Tensor | None,
        highest: torch.Tensor | None,
    ) -> torch.Tensor:
        passes = None if lowest is None else lowest.isnan()
        qparams = None if lowest is None or highest is None else _given(x, grid, lowest, highest)
        if grid.granularity is TokenGranularity.PER_TENSOR:
            grid = replace(grid, granularity=TokenGranularity.PER_TOKEN)
        masks = ctx.needs_input_grad[0] and grid.may_clip
        found = fake_quantize_input(x.contiguous(), grid, qparams=qparams, with_unclipped=masks)
        unclipped = found.unclipped
        if masks and unclipped is None:
            normalized = normalize(in_groups(x.to(working_dtype(x)), grid), found.qparams[0])
            inside = straight_through(torch.ones_like(normalized), normalized, grid)
            unclipped = bitmask.pack(inside.reshape(-1) != 0)
        ctx.save_for_backward(unclipped if masks else None, passes if masks else None)
        return found.values if passes is None else torch.where(passes, x, found.values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        unclipped, passes = ctx.saved_tensors
        if unclipped is None:
            return grad, None, None, None
        masked = grad.clone(memory_format=torch.contiguous_format)
        bitmask.apply_(masked.view(-1), unclipped)
        return masked if passes is None else torch.where(passes, grad, masked), None, None, None


def _given(x: torch.Tensor, grid: ActivationGrid, lowest: torch.Tensor, highest: torch.Tensor) -> QParams:
    """QParams of the rows for their ranges; of rows that pass as they are, any."""
    dtype = working_dtype(x)
    passes = lowest.isnan()
    low, high = (
        torch.where(passes, 0.0, torch.where(end.isinf(), torch.nan, end)).to(dtype)
        for end in (lowest, highest)
    )
    if not grid.has_global_scale:
        return qparams_from_range(low, high, grid)
    shared = global_scale_of(torch.maximum(high, low.neg()), _number(grid))
    return choose_qparams(
        in_groups(x.to(dtype), grid), (-1,), grid, shared if low.dim() == 1 else shared.unsqueeze(-1)
    )


def _number(grid: ActivationGrid) -> Any:
    known = grid.number_format
    assert known is not None
    return known.number
