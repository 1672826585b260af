"""Scales and ranges follow the experts and outputs that a cut leaves."""

from __future__ import annotations

import pytest
import torch

from ds_compress.structure.scale_cuts import Layout, experts_left, scales_left

EXPERTS, OUTPUTS, INPUTS = 3, 4, 6


class _Plan:
    """Keeps experts 0 and 2, and of each its own outputs."""

    own = torch.tensor([[0, 3], [1, 2], [2, 3]])

    def __init__(self, outputs_axis: int, is_stack: bool) -> None:
        self.axis = outputs_axis + int(is_stack)
        self.is_stack = is_stack

    def touches(self, name: str) -> bool:
        return name == "w"

    def prune_tensor(self, name: str, tensor: torch.Tensor, is_weight: bool = True) -> torch.Tensor:
        if not self.is_stack:
            return tensor.index_select(self.axis, self.own[0])
        kept = [tensor[e].index_select(self.axis - 1, self.own[e]) for e in range(len(tensor))]
        return torch.stack([kept[0], kept[2]])

    def kept_along(self, name: str, dim: int, size: int) -> torch.Tensor:
        return torch.tensor([0, 2])


@pytest.mark.parametrize("outputs_axis", [0, 1])
def test_a_stack_of_groups(outputs_axis: int) -> None:
    matrix = (OUTPUTS, INPUTS) if outputs_axis == 0 else (INPUTS, OUTPUTS)
    scale = torch.arange(EXPERTS * OUTPUTS * 2.0).view(EXPERTS, OUTPUTS, 2)
    given = scale if outputs_axis == 0 else scale.transpose(1, 2)
    plan = _Plan(outputs_axis, True)
    found = scales_left(given, "w", (EXPERTS, *matrix), Layout(outputs_axis, True), plan)  # type: ignore[arg-type]
    expected = torch.stack([scale[e][_Plan.own[e]] for e in (0, 2)])
    assert torch.equal(found, expected if outputs_axis == 0 else expected.transpose(1, 2))


def test_a_stack_with_a_scale_for_each_row_and_for_each_matrix() -> None:
    plan = _Plan(0, True)
    shape, layout = (EXPERTS, OUTPUTS, INPUTS), Layout(0, True)
    rows = torch.arange(EXPERTS * 4.0).view(EXPERTS, OUTPUTS)
    expected = torch.stack([rows[e][_Plan.own[e]] for e in (0, 2)])
    assert torch.equal(scales_left(rows, "w", shape, layout, plan), expected)  # type: ignore[arg-type]
    each = torch.arange(3.0).view(3, 1)
    assert torch.equal(scales_left(each, "w", shape, layout, plan), each[[0, 2]])  # type: ignore[arg-type]
    assert torch.equal(experts_left(each, "w", plan), each[[0, 2]])  # type: ignore[arg-type]


@pytest.mark.parametrize("outputs_axis", [0, 1])
def test_one_matrix(outputs_axis: int) -> None:
    shape = (OUTPUTS, INPUTS) if outputs_axis == 0 else (INPUTS, OUTPUTS)
    scale = torch.arange(OUTPUTS * 2.0).view(OUTPUTS, 2)
    given = scale if outputs_axis == 0 else scale.t()
    plan, layout = _Plan(outputs_axis, False), Layout(outputs_axis, False)
    found = scales_left(given, "w", shape, layout, plan)  # type: ignore[arg-type]
    assert torch.equal(found, scale[[0, 3]] if outputs_axis == 0 else scale[[0, 3]].t())
    assert scales_left(given, "other", shape, layout, plan) is given  # type: ignore[arg-type]
