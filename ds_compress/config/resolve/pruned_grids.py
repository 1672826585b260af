"""Pruned weights that are quantized too: their zeros have to be a point of the grid.

Of all grids only the legacy asymmetric one has no such point where the largest weight of a group is zero: it reaches
from min to max - scale. A group of a few negative weights and zeros then reads its zeros as -scale. The narrow grid
reaches from min to max, and is what an absent `narrow_range` means for such weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ds_compress.config.resolve.structures import StructurePlan
from ds_compress.config.targets import TechniquePlan
from ds_compress.errors import Problem, dotted
from ds_compress.modelinfo.inventory import few

_BLOCK = "weight_quantization"


def with_pruned_marked(
    techniques: Mapping[str, TechniquePlan], structures: Mapping[str, StructurePlan]
) -> dict[str, TechniquePlan]:
    """`techniques`, in which every quantized weight knows whether another block prunes it."""
    marked = dict(techniques)
    if _BLOCK in marked:
        sparse = techniques.get("sparse_pruning")
        pruned = {target.param_name for target in sparse.targets} if sparse is not None else set()
        for structure_plan in structures.values():
            for structure in structure_plan.targets:
                pruned |= {member.tensor for member in structure.structure.slices}
        block = marked[_BLOCK]
        targets = tuple(replace(t, pruned=t.param_name in pruned) for t in block.targets)
        marked[_BLOCK] = replace(block, targets=targets)
    return marked


def grid_problems(techniques: Mapping[str, TechniquePlan]) -> Iterator[Problem]:
    """An asymmetric grid that was asked to be the legacy one where weights are pruned."""
    block = techniques.get(_BLOCK)
    if (
        block is None
        or block.shared.quantization_type != "asymmetric"
        or block.shared.narrow_range is not False
    ):
        return
    pruned = [target.module_name for target in block.targets if target.pruned]
    if pruned:
        yield Problem(
            dotted(_BLOCK, "shared_parameters", "narrow_range"),
            f"false with {few(pruned)}, which are pruned",
            "true or absent: the legacy asymmetric grid cannot represent every zero",
            'remove "narrow_range", or set quantization_type to "symmetric"',
        )
