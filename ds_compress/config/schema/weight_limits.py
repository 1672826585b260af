"""Limits of `weight_quantization` on given weights: shapes that groups do not divide, embeddings, pruned zeros."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ds_compress.config.targets import Target, TechniquePlan, inputs_of
from ds_compress.errors import Problem, dotted, shown
from ds_compress.modelinfo.inventory import exact_pattern, few
from ds_compress.modelinfo.kinds import ModuleKind


def uneven_groups(key: str, shared: Any, targets: Sequence[Target]) -> Iterator[Problem]:
    """Weights that `quantize_groups` does not divide."""
    # An embedding has one scale per row, whatever quantize_groups says.
    counted = [
        target
        for target in targets
        if target.kind is not ModuleKind.EMBEDDING
        and shared.granularity_of(target.params) in (None, "per_group")
    ]
    uneven = [target for target in counted if _weights_of_a_matrix(target) % shared.quantize_groups]
    if uneven:
        names = few([f"{target.module_name} {list(target.shape)}" for target in uneven])
        yield Problem(
            dotted(key, "shared_parameters", "quantize_groups"),
            f"{shared.quantize_groups} with {names}",
            "a divisor of the number of weights of each layer, or of each expert's matrix",
            'choose another number, exclude these layers, or set granularity to "per_channel"',
        )


def _weights_of_a_matrix(target: Target) -> int:
    return math.prod(target.shape) // target.matrices


def unsuitable_embeddings(key: str, shared: Any, targets: Sequence[Target]) -> Iterator[Problem]:
    """Embeddings whose options fake quantization cannot keep."""
    obstacles = {
        "sparse": "sparse=True has no gradient for the whole weight",
        "max_norm": "max_norm rewrites the weight in forward",
    }
    if shared.effective_scales == "learned":
        obstacles["scale_grad_by_freq"] = "learned scales do not know scale_grad_by_freq"
    for target in targets:
        for option, why in obstacles.items():
            if target.kind is ModuleKind.EMBEDDING and getattr(target.module, option) not in (None, False):
                yield Problem(
                    dotted(key, "different_groups", target.group, "modules"),
                    f"{target.module_name}, an embedding built with {option}",
                    f"embeddings without it: {why}",
                    f"build it without {option}, or add {shown(exact_pattern(target.module_name))} to "
                    "shared_parameters.excluded_modules",
                )


def groups_that_a_cut_breaks(
    technique: TechniquePlan, shapes_after: Mapping[str, tuple[int, ...]]
) -> Iterator[Problem]:
    """Sizes of groups that fit a weight, and not what structured pruning will leave of it."""
    shared = technique.shared
    cut = [
        (t, replace(t, shape=shapes_after[t.param_name]))
        for t in technique.targets
        if t.param_name in shapes_after
    ]
    counted = [(target, after) for target, after in cut if target.kind is not ModuleKind.EMBEDDING]
    uneven: list[tuple[Target, Target]] = []
    group, key = 0, ""
    for target, after in counted:
        granularity = shared.granularity_of(target.params)
        if granularity == "per_column_group":
            size, name = shared.group_size_of(target.params), "group_size"
            fits = not inputs_of(after) % size or bool(inputs_of(target) % size)
        elif granularity in (None, "per_group"):
            size, name = shared.quantize_groups, "quantize_groups"
            fits = not _weights_of_a_matrix(after) % size
        else:
            continue
        if not fits:
            uneven.append((target, after))
            group, key = size, name
    if uneven:
        shapes = [f"{target.module_name} (then {list(after.shape)})" for target, after in uneven]
        format = uneven[-1][0].params.format
        where = ("shared_parameters", key)
        if format != "int":
            where = ("different_groups", f"{uneven[-1][0].group}.params.format")
        yield Problem(
            dotted(technique.block, *where),
            f"{group if format == 'int' else shown(format)} with {few(shapes)}",
            "a size that fits the weights that structured pruning will leave",
            "choose a dense_ratio or round_to that leaves a multiple of it, or another group size",
        )


def given_scales_that_a_cut_breaks(
    technique: TechniquePlan, shapes_after: Mapping[str, tuple[int, ...]]
) -> Iterator[Problem]:
    """Groups of columns that lose some of their members, and with them the meaning of a scale that was given."""
    shared = technique.shared
    if not shared.has_given_scales:
        return
    cut = [
        target.module_name
        for target in technique.targets
        if (after := shapes_after.get(target.param_name)) is not None
        and shared.granularity_of(target.params) in ("per_column_group", "per_block")
        and inputs_of(replace(target, shape=after)) != inputs_of(target)
    ]
    if cut:
        key = "learned_scale" if shared.scales is None else "scales"
        yield Problem(
            dotted(technique.block, "shared_parameters", key),
            f"{shown(getattr(shared, key))} with {few(cut)}, of which structured pruning removes columns",
            '"dynamic" scales, or one scale for whole rows: what is left of a group has no scale of its own',
            'set scales to "dynamic", or granularity to "per_channel"',
        )


def grids_without_zero(technique: TechniquePlan) -> Iterator[Problem]:
    """An asymmetric grid that was asked to be the legacy one where weights are pruned.

    Of all grids only the legacy asymmetric one has no point for zero where the largest weight of a group is zero: it
    reaches from min to max - scale. A group of a few negative weights and zeros then reads its zeros as -scale. The
    narrow grid reaches from min to max, and is what an absent `narrow_range` means for such weights.
    """
    shared = technique.shared
    if shared.quantization_type != "asymmetric" or shared.narrow_range is not False:
        return
    pruned = [target.module_name for target in technique.targets if target.pruned]
    if pruned:
        yield Problem(
            dotted(technique.block, "shared_parameters", "narrow_range"),
            f"false with {few(pruned)}, which are pruned",
            "true or absent: the legacy asymmetric grid cannot represent every zero",
            'remove "narrow_range", or set quantization_type to "symmetric"',
        )
