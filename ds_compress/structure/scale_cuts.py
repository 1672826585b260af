"""What is left of the numbers that belong to a weight, its scales and ranges, once the weight was cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ds_compress.modelinfo.experts import fused_experts
from ds_compress.structure.pruning_plan import PruningPlan


class Layout(NamedTuple):
    """outputs_axis: of one matrix of a weight: 1 where that is [inputs, outputs]. is_stack: whether the first axis of
    the weight numbers experts."""

    outputs_axis: int
    is_stack: bool


def layout_of(module: nn.Module) -> Layout:
    """How the weights of a quantized module lie."""
    experts = fused_experts(module)
    if experts is not None:
        return Layout(int(experts.transposed), True)
    return Layout(int("Conv1D" in type(module).__name__), False)


def scales_left(
    scale: torch.Tensor, weight: str, shape: Sequence[int], layout: Layout, pruning_plan: PruningPlan
) -> torch.Tensor:
    """The given scales of the experts and outputs that stay; `scale` itself where there is one for all outputs.

    Args:
        scale: of `quant.layout.scale_shape`.
        weight, shape: the name of the weight and its shape, before the cut.
    """
    outputs_axis, is_stack = layout
    if scale.dim() == 0 or not pruning_plan.touches(weight):
        return scale
    axis = outputs_axis + int(is_stack)
    experts, outputs = shape[0] if is_stack else 1, shape[axis]
    view = [1] * len(shape)
    view[axis] = outputs
    if is_stack:
        view[0] = experts
    # Which outputs are left shows in what the cut makes of their numbers.
    numbers = torch.arange(experts * outputs).view(view).expand(tuple(shape))
    left = pruning_plan.prune_tensor(weight, numbers, is_weight=False)
    left = left if is_stack else left.unsqueeze(0)
    left = left.movedim(outputs_axis + 1, 1).flatten(2)[..., 0]
    own, stacked = left % outputs, scale if is_stack else scale.unsqueeze(0)
    kept = stacked[left[:, 0] // outputs]
    # Groups of inputs come before the outputs of a transposed matrix.
    scales_axis = stacked.dim() - 1 if outputs_axis and stacked.dim() > 1 else 1
    if stacked.dim() > scales_axis and stacked.shape[scales_axis] == outputs:
        by_output = kept.movedim(scales_axis, 1)
        index = own.view(*own.shape, *[1] * (by_output.dim() - 2)).expand(-1, -1, *by_output.shape[2:])
        kept = by_output.gather(1, index).movedim(1, scales_axis)
    return kept if is_stack else kept[0]


def experts_left(numbers: torch.Tensor, weight: str, pruning_plan: PruningPlan) -> torch.Tensor:
    """Of numbers [experts, ...] of a stack those of the experts that stay."""
    return numbers[pruning_plan.kept_along(weight, 0, len(numbers))]
