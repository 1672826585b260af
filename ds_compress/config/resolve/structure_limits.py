"""What other blocks ask of a weight that structured pruning will make smaller."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ds_compress.config.resolve.limits import inputs_of
from ds_compress.config.resolve.structures import StructurePlan, shape_after
from ds_compress.config.schema.sparse_pruning import UNSTRUCTURED, SparsePruningShared
from ds_compress.config.schema.weight_quantization import WeightQuantizationShared
from ds_compress.config.targets import Target, TechniquePlan
from ds_compress.errors import Problem, dotted
from ds_compress.modelinfo.inventory import few
from ds_compress.modelinfo.kinds import ModuleKind


def structure_conflicts(
    plans: Mapping[str, StructurePlan], techniques: Mapping[str, TechniquePlan]
) -> Iterator[Problem]:
    """Patterns and groups of columns that do not survive when rows and columns go."""
    if not plans:
        return
    for key, technique in techniques.items():
        cut = [
            (target, replace(target, shape=shape))
            for target in technique.targets
            if (shape := shape_after(plans, target.param_name, target.shape)) != target.shape
        ]
        if key == "sparse_pruning":
            yield from _broken_patterns(technique.shared, cut)
        if key == "weight_quantization":
            yield from _uneven_groups(technique.shared, cut, " and ".join(plans))


def _broken_patterns(shared: SparsePruningShared, cut: list[tuple[Target, Target]]) -> Iterator[Problem]:
    pattern = shared.effective_pattern
    if pattern != UNSTRUCTURED and cut:
        yield Problem(
            dotted("sparse_pruning", "shared_parameters", "pattern"),
            f'"{pattern}" with {few([target.module_name for target, _ in cut])}, which lose rows or columns',
            f'"{UNSTRUCTURED}": what is left of a weight would be out of step with the pattern',
            "exclude these layers in excluded_modules of one of the blocks",
        )


def _uneven_groups(
    shared: WeightQuantizationShared, cut: list[tuple[Target, Target]], blocks: str
) -> Iterator[Problem]:
    counted = [(target, after) for target, after in cut if target.kind is not ModuleKind.EMBEDDING]
    if shared.granularity == "per_column_group":
        group, key = shared.effective_group_size, "group_size"
        uneven = [(t, after) for t, after in counted if inputs_of(after) % group and not inputs_of(t) % group]
    elif shared.granularity in (None, "per_group"):
        group, key = shared.quantize_groups, "quantize_groups"
        uneven = [(t, after) for t, after in counted if math.prod(after.shape) % group]
    else:
        return
    if uneven:
        shapes = [f"{target.module_name} (then {list(after.shape)})" for target, after in uneven]
        yield Problem(
            dotted("weight_quantization", "shared_parameters", key),
            f"{group} with {few(shapes)}",
            f"a size that fits the weights that {blocks} will leave",
            "choose a dense_ratio or round_to that leaves a multiple of it, or another group size",
        )
