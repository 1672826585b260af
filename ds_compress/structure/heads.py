"""Heads: structures of the attention layers of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from ds_compress.structure.attention import Attention, attentions_of
from ds_compress.structure.inventory import Inventory, rows, settled, unique
from ds_compress.structure.structure import Member, Refusal, Structure, StructureKind

OF_ROOT_MEAN_SQUARE = -0.5
"""Rescale of a normalization's weight: the mean over k entries is n / k times that over n, of which n - k are 0."""


def head_structures(
    inventory: Inventory, num_heads: int | None = None
) -> tuple[list[Structure], list[Refusal]]:
    """One structure per attention layer; one for all layers that add the same table of position biases (T5)."""
    attentions, refusals = attentions_of(inventory, num_heads)
    structures = [_structure(inventory, group) for group in _sharing_a_table(inventory, attentions)]
    return settled(inventory, structures, refusals)


def _structure(inventory: Inventory, attentions: list[Attention]) -> Structure:
    first = attentions[0]
    members = [member for attention in attentions for member in _members(inventory, attention)]
    alone = len(attentions) == 1
    return Structure(
        name=first.name,
        kind=StructureKind.HEAD,
        modules=unique([name for attention in attentions for name in _modules(attention)]),
        units=first.units,
        members=tuple(members),
        # The inputs of several output projections cannot be observed at one place.
        observed=first.output.name if alone else None,
        observed_index=rows(first.units, first.width) if alone else None,
    )


def _members(inventory: Inventory, attention: Attention) -> list[Member]:
    units = attention.units
    members = [
        member
        for part in attention.inputs
        for member in part.projection.writers(rows(units, part.width, part.start))
    ]
    members.append(attention.output.reader(rows(units, attention.width), scored=True))
    for norm, width in attention.norms:
        weight = inventory.tensor(norm, "weight")
        if weight is not None:
            members.append(Member(weight, 0, rows(units, width), masked=False, rescale=OF_ROOT_MEAN_SQUARE))
    if attention.bias_table is not None:
        table = inventory.tensor(attention.bias_table, "weight")
        assert table is not None
        members.append(Member(table, 1, rows(units, attention.heads // units), masked=False))
    return members


def _modules(attention: Attention) -> list[str]:
    names = [attention.name, attention.holder, *(part.projection.name for part in attention.inputs)]
    names.append(attention.output.name)
    return [*names, attention.bias_table] if attention.bias_table is not None else names


def _sharing_a_table(inventory: Inventory, attentions: Iterable[Attention]) -> list[list[Attention]]:
    """Groups that must lose the same heads: the layers of a stack in which only one has a table."""
    groups: dict[str, list[Attention]] = {}
    for attention in attentions:
        groups.setdefault(_place(inventory, attention.name), []).append(attention)
    result = []
    for group in groups.values():
        tables = sum(attention.bias_table is not None for attention in group)
        if tables == 1:
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
