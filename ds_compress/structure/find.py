"""Finding the prunable groups of a model, and what looks like one and cannot be pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_compress.structure.attention import attention_projections
from ds_compress.structure.channels import channel_groups
from ds_compress.structure.experts import expert_groups
from ds_compress.structure.feed_forward import row_groups
from ds_compress.structure.heads import head_groups
from ds_compress.structure.hidden import hidden_groups
from ds_compress.structure.inventory import Inventory
from ds_compress.structure.layers import layer_groups
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup, Unsupported


@dataclass(frozen=True)
class FoundGroups:
    """Groups of one kind, in the order of the model, and modules that look like one but cannot be pruned."""

    groups: tuple[PrunableGroup, ...]
    unsupported: tuple[Unsupported, ...]


def find_groups(
    model: nn.Module,
    kind: GroupKind,
    num_heads: int | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    stack: str | None = None,
) -> FoundGroups:
    """Groups of one kind in `model`, from shapes, names, attributes and configs; no weight is read.

    Args:
        num_heads: of attention layers that have no attribute for it.
        example_inputs: keyword arguments of the model's forward, for CHANNEL; by default `model.dummy_inputs` or
            an image as the config describes it.
        stack: the ModuleList of layers, for LAYER; by default all that are found.

    Raises:
        ConfigError: there is no ModuleList `stack`.
    """
    inventory = Inventory(model)
    if kind is GroupKind.ROW:
        groups, unsupported = row_groups(inventory, attention_projections(inventory))
    elif kind is GroupKind.HEAD:
        groups, unsupported = head_groups(inventory, num_heads)
    elif kind is GroupKind.LAYER:
        groups, unsupported = layer_groups(inventory, stack)
    elif kind is GroupKind.HIDDEN:
        groups, unsupported = hidden_groups(inventory)
    elif kind is GroupKind.EXPERT:
        groups, unsupported = expert_groups(inventory)
    else:
        groups, unsupported = channel_groups(inventory, example_inputs)
    return FoundGroups(tuple(groups), tuple(unsupported))
