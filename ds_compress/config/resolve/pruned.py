"""Targets that know whether another block makes zeros of them, which have to be zero in forward too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from ds_compress.config.structure_targets import StructurePlan
from ds_compress.config.targets import TechniquePlan


def with_pruned_marked(
    techniques: Mapping[str, TechniquePlan],
    structures: Mapping[str, StructurePlan],
    removing: Collection[str],
) -> dict[str, TechniquePlan]:
    """`techniques`, in which every target of the others knows whether a block of `removing`, or a cut, prunes it."""
    pruned = {target.param_name for key in removing for target in techniques[key].targets}
    for plan in structures.values():
        for target in plan.targets:
            pruned |= {member.tensor for member in target.structure.slices}
    return {
        key: technique
        if key in removing
        else replace(
            technique,
            targets=tuple(replace(t, pruned=t.param_name in pruned) for t in technique.targets),
        )
        for key, technique in techniques.items()
    }
