"""Rows inside fused experts: the intermediate entries of each expert, of which each chooses its own.

Unit e * intermediate + i is entry i of expert e: its row of the gate and of the projection beside it, the entries of
their biases, and its column of the projection that narrows. All experts of a module keep as many, because their
matrices stay one three-dimensional parameter, and the config one number.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from ds_compress.modelinfo.experts import FusedExperts, fused_experts
from ds_compress.structure.inventory import Inventory
from ds_compress.structure.prunable_group import CoupledSlice, GroupKind, PrunableGroup

_WHOLE_ROWS = 8
"""Entries whose 16-bit values fill 16 bytes, of which rows of grouped matrix products must have a whole number."""


def multiple_of_widths(module: nn.Module) -> int:
    """What the widths of fused experts must be a multiple of, where transformers multiplies all of them in one call."""
    return _WHOLE_ROWS if hasattr(module, "is_concatenated") else 1


def expert_row_groups(inventory: Inventory) -> list[PrunableGroup]:
    """One group for each module of fused experts, in model order."""
    layouts = ((name, fused_experts(module)) for name, module in inventory.modules.items())
    return [_group(inventory, name, layout) for name, layout in layouts if layout is not None and name]


def counted_alike(groups: list[PrunableGroup]) -> list[PrunableGroup]:
    """Feed-forward groups, all in the multiples of the experts among them, so that equal ratios stay equal widths.

    A shared expert that is as wide as n experts together keeps as much as n of them.
    """
    experts = next((group for group in groups if group.multiple > 1), None)
    if experts is None:
        return groups

    def multiple(group: PrunableGroup) -> int:
        times, rest = divmod(group.width, experts.width)
        return experts.multiple * (times if times and not rest and "shared" in group.name else 1)

    return [group if group.parts > 1 else replace(group, multiple=multiple(group)) for group in groups]


def expert_hidden_slices(inventory: Inventory, name: str, index: torch.Tensor) -> list[CoupledSlice]:
    """The entries of the residual stream that the fused experts `name` read and write; index: int64 (hidden, 1)."""
    layout = fused_experts(inventory.modules[name])
    assert layout is not None
    up, down = (2, 1) if not layout.transposed else (1, 2)
    slices = [
        CoupledSlice(_tensor(inventory, name, layout.up), up, index, scored=True),
        CoupledSlice(_tensor(inventory, name, layout.down), down, index, scored=True),
    ]
    bias = f"{layout.down}_bias"
    if bias in layout.biases:
        slices.append(CoupledSlice(_tensor(inventory, name, bias), 1, index))
    return slices


def _group(inventory: Inventory, name: str, layout: FusedExperts) -> PrunableGroup:
    written = _written(layout.experts, layout.intermediate, layout.has_gate, layout.interleaved)
    read = _written(layout.experts, layout.intermediate, False, False)
    outputs, inputs = (1, 2) if not layout.transposed else (2, 1)
    slices = [
        CoupledSlice(_tensor(inventory, name, layout.up), outputs, written, scored=True, of_experts=True)
    ]
    bias = f"{layout.up}_bias"
    if bias in layout.biases:
        slices.append(CoupledSlice(_tensor(inventory, name, bias), 1, written, of_experts=True))
    slices.append(CoupledSlice(_tensor(inventory, name, layout.down), inputs, read, of_experts=True))
    units = layout.experts * layout.intermediate
    return PrunableGroup(
        name,
        GroupKind.ROW,
        (name,),
        units,
        tuple(slices),
        parts=layout.experts,
        multiple=multiple_of_widths(inventory.modules[name]),
    )


@lru_cache(maxsize=8)
def _written(experts: int, intermediate: int, has_gate: bool, interleaved: bool) -> torch.Tensor:
    """int64 (experts * intermediate, 1 or 2): outputs of each unit. The layers of a model share one tensor."""
    width = 2 if has_gate else 1
    one = torch.arange(intermediate).unsqueeze(1)
    half = torch.arange(width)
    own = width * one + half if interleaved else one + intermediate * half
    first = width * intermediate * torch.arange(experts)
    return (first.view(-1, 1, 1) + own).flatten(0, 1)


def _tensor(inventory: Inventory, module: str, key: str) -> str:
    name = inventory.tensor(module, key)
    assert name is not None
    return name
