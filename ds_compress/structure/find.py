"""Finding the structures of a model: what it could lose whole, and what it could not and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_compress.structure.attention import attentions_of
from ds_compress.structure.channels import channel_structures
from ds_compress.structure.feed_forward import row_structures
from ds_compress.structure.heads import head_structures
from ds_compress.structure.hidden import hidden_structures
from ds_compress.structure.inventory import Inventory
from ds_compress.structure.layers import layer_structures
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup, Unsupported


@dataclass(frozen=True)
class Found:
    """Structures of one kind, in the order of the model, and modules that look like some but cannot be pruned."""

    structures: tuple[PrunableGroup, ...]
    unsupported: tuple[Unsupported, ...]


def find_structures(
    model: nn.Module,
    kind: GroupKind,
    num_heads: int | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    stack: str | None = None,
) -> Found:
    """Structures of one kind in `model`, from shapes, names, attributes and configs; no weight is read.

    Args:
        num_heads: of attention layers that do not say how many heads they have.
        example_inputs: keyword arguments of the model's forward, for CHANNEL; by default `model.dummy_inputs` or
            an image as the config describes it.
        stack: the ModuleList of layers, for LAYER; by default all that are found.

    Raises:
        ConfigError: there is no ModuleList `stack`.
    """
    inventory = Inventory(model)
    if kind is GroupKind.ROW:
        structures, unsupported = row_structures(inventory, _attention_projections(inventory))
    elif kind is GroupKind.HEAD:
        structures, unsupported = head_structures(inventory, num_heads)
    elif kind is GroupKind.LAYER:
        structures, unsupported = layer_structures(inventory, stack)
    elif kind is GroupKind.HIDDEN:
        structures, unsupported = hidden_structures(inventory)
    else:
        structures, unsupported = channel_structures(inventory, example_inputs)
    return Found(tuple(structures), tuple(unsupported))


def _attention_projections(inventory: Inventory) -> frozenset[str]:
    attentions, _ = attentions_of(inventory)
    return frozenset(
        name
        for attention in attentions
        for name in (attention.output.name, *(part.projection.name for part in attention.inputs))
    )
