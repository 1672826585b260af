"""What a config means for the prunable groups of one model: which are claimed, and how many units stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ds_compress.config.targets import exact_ceil
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup


@dataclass(frozen=True)
class StructureTarget:
    """One structure that one group claims, and the fraction of its units that is kept."""

    structure: PrunableGroup
    group: str
    dense_ratio: float


@dataclass(frozen=True)
class StructurePlan:
    """One enabled structured-pruning block: its key, what holds for all its groups, and its structures."""

    block: str
    kind: GroupKind
    shared: Any
    targets: tuple[StructureTarget, ...]


def kept_units(dense_ratio: float, units: int, round_to: int, rounds_up: bool = False) -> int:
    """The multiple of `round_to` nearest to dense_ratio * units (halves up), at least one; `units` for a ratio of 1.

    `rounds_up`: ceil(dense_ratio * units) instead, as single weights are counted and as the removed library did.
    """
    if dense_ratio == 1:
        return units
    multiples = Fraction(repr(dense_ratio)) * units / round_to
    if rounds_up:
        return exact_ceil(dense_ratio, units)
    return min(units, round_to * max(1, int(multiples + Fraction(1, 2))))


def units_left(structure: PrunableGroup, dense_ratio: float, shared: Any) -> int:
    """How many units of `structure` stay at this density; of each of its parts as many, in the group's multiples.

    shared: of its block.
    """
    multiple = structure.multiple
    own = kept_units(dense_ratio, structure.width, math.lcm(shared.round_to, multiple), shared.rounds_up)
    if shared.rounds_up:
        own = min(structure.width, -(-own // multiple) * multiple)
    return structure.parts * own


class ShapesLeft:
    """What structured pruning leaves of each parameter; made once for a plan, for models have many parameters."""

    def __init__(self, plans: Mapping[str, StructurePlan]) -> None:
        self._lost: dict[str, dict[int, int]] = {}
        self._layers: dict[str, Fraction] = {}
        for plan in plans.values():
            for target in plan.targets:
                self._add(target, _kept_in_the_end(plan, target))

    def _add(self, target: StructureTarget, kept: int) -> None:
        structure = target.structure
        for layer in structure.layers:
            self._layers.setdefault(layer, Fraction(kept, structure.units))
        if not structure.removable:
            return
        for member in structure.slices:
            sharers = structure.parts if member.of_experts else 1
            lost = self._lost.setdefault(member.tensor, {})
            numel = (structure.units - kept) * member.index.shape[1] // sharers
            lost[member.dim] = lost.get(member.dim, 0) + numel

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the parameter `name`, once the units that its structures lose are removed."""
        lost = self._lost.get(name, {})
        return tuple(size - lost.get(dim, 0) for dim, size in enumerate(shape))

    def share(self, name: str) -> Fraction:
        """Of the layers that stay, for a parameter of a layer that may go; 1 for all others."""
        end = name.find(".")
        while end >= 0:
            found = self._layers.get(name[:end])
            if found is not None:
                return found
            end = name.find(".", end + 1)
        return Fraction(1)


def _kept_in_the_end(plan: StructurePlan, target: StructureTarget) -> int:
    return units_left(target.structure, target.dense_ratio, plan.shared)
