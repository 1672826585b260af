"""Attention heads as prunable groups: one for each attention layer of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from ds_compress.structure.attention import Attention, attentions_of
from ds_compress.structure.inventory import Inventory, exclude_tied, rows, unique
from ds_compress.structure.prunable_group import CoupledSlice, GroupKind, PrunableGroup, Unsupported


def head_groups(
    inventory: Inventory, num_heads: int | None = None
) -> tuple[list[PrunableGroup], list[Unsupported]]:
    """One group per attention layer; one for all layers that use the same position biases (T5)."""
    attentions, unsupported = attentions_of(inventory, num_heads)
    groups = [_group(group) for group in _sharing_a_bias(inventory, attentions)]
    return exclude_tied(inventory, groups, unsupported)


def _group(attentions: list[Attention]) -> PrunableGroup:
    first = attentions[0]
    slices = [coupled for attention in attentions for coupled in _slices(attention)]
    alone = len(attentions) == 1
    return PrunableGroup(
        name=first.name,
        kind=GroupKind.HEAD,
        modules=unique([name for attention in attentions for name in _modules(attention)]),
        units=first.units,
        slices=tuple(slices),
        # The inputs of several output projections cannot be observed at one place.
        observed=first.output.name if alone else None,
        observed_index=rows(first.units, first.width) if alone else None,
    )


def _slices(attention: Attention) -> list[CoupledSlice]:
    units = attention.units
    slices = [
        coupled
        for part in attention.inputs
        for coupled in part.projection.writers(rows(units, part.width, part.start))
    ]
    slices.append(attention.output.reader(rows(units, attention.width), scored=True))
    slices += [
        CoupledSlice(
            vector.tensor, vector.dim, rows(units, vector.width), masked=False, rescale=vector.rescale
        )
        for vector in attention.vectors
    ]
    return slices


def _modules(attention: Attention) -> list[str]:
    names = [attention.name, attention.holder, *(part.projection.name for part in attention.inputs)]
    names.append(attention.output.name)
    return [*names, attention.bias_table] if attention.bias_table is not None else names


def _sharing_a_bias(inventory: Inventory, attentions: Iterable[Attention]) -> list[list[Attention]]:
    """Attention layers that must lose the same heads: those of all layers, when the first passes its position bias on.

    In T5 the first self-attention of a stack computes it from its table, the first cross-attention from zeros.
    """
    groups: dict[str, list[Attention]] = {}
    for attention in attentions:
        groups.setdefault(_place(inventory, attention.name), []).append(attention)
    result = []
    for group in groups.values():
        tables = sum(attention.bias_table is not None for attention in group)
        hand_on = any(hasattr(inventory.modules[a.holder], "has_relative_attention_bias") for a in group)
        if tables == 1 or (tables == 0 and hand_on):
            result.append(sorted(group, key=lambda attention: attention.bias_table is None))
        else:
            result += [[attention] for attention in group]
    return result


def _place(inventory: Inventory, name: str) -> str:
    """The name without the number of the outermost list's item: equal for the same part of every layer."""
    for match in re.finditer(r"\.(\d+)\.", name):
        if isinstance(inventory.modules.get(name[: match.start()]), nn.ModuleList):
            return f"{name[: match.start()]}.*.{name[match.end() :]}"
    return name
