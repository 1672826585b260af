"""Whether a format can represent the result of a plan: checked at start, so that no training ends with an error.

What depends on trained values is left to the export, such as a static input range that does not contain 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_compress.config.report.size_estimate import format_of
from ds_compress.config.structure_targets import ShapesLeft, StructurePlan, units_left
from ds_compress.errors import ROOT, ConfigError, Problem, listed, shown
from ds_compress.export import trial_load
from ds_compress.export.expert_misfits import expert_misfits
from ds_compress.export.float_misfits import float_misfits
from ds_compress.export.format import is_hf_model
from ds_compress.export.graph_format import GRAPHS, generates
from ds_compress.modelinfo.kinds import ModuleKind
from ds_compress.structure.pruning_plan import PruningPlan
from ds_compress.structure.vanilla_hf import vanilla_hf_obstacles

if TYPE_CHECKING:
    from ds_compress.config.report.plan import Plan
    from ds_compress.config.targets import Target

FORMATS = ("hf", "compressed-tensors", "torch", "onnx", "openvino")
_VANILLA_HF = ("hf", "compressed-tensors")


def refuse_unfit(plan: Plan, model: nn.Module) -> None:
    """Raises ConfigError where the block's `export_to` cannot represent the result of this plan."""
    format = plan.config.export_to
    if format is None:
        return
    reasons = misfits(plan, model, format)
    if not reasons:
        return
    fitting = [other for other in FORMATS if other != format and not misfits(plan, model, other)]
    hint = (
        f"{listed(fitting, 'or')} can; or change what the reasons name"
        if fitting
        else "change what they name"
    )
    path, allowed = f"{ROOT}.export_to", "a format that can represent it"
    raise ConfigError([Problem(path, f"{shown(format)}: {reason}", allowed, hint) for reason in reasons])


def notes(plan: Plan, model: nn.Module) -> Iterator[str]:
    """For the reader of the plan: which formats the result can be exported in."""
    reasons = {format: misfits(plan, model, format) for format in FORMATS}
    fitting = [format for format, found in reasons.items() if not found]
    yield f"exports as {listed(fitting) if fitting else 'nothing'}"
    for format, found in reasons.items():
        if found:
            yield f"not as {format}: {found[0]}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def loads_packed(plan: Plan, model: nn.Module) -> bool:
    """Whether stock transformers loads packed weights of this model, where the plan has any for it."""
    targets = [t for t in _targets(plan, "weight_quantization") if t.kind is ModuleKind.LINEAR]
    if not targets or not is_hf_model(model) or format_of(plan) != "compressed-tensors":
        return True
    claimed = {target.param_name for target in targets}
    untied = any(len(weight.users) > 1 and weight.name in claimed for weight in plan.weights)
    return trial_load.loads_packed(model, [target.module_name for target in targets], untied)


def misfits(plan: Plan, model: nn.Module, format: str) -> list[str]:
    """Sentences that name the module; empty: the format can represent all of it."""
    return [
        *_scales(plan),
        *_of_model(model, format),
        *_of_quantizers(plan, format),
        *float_misfits(plan, model, format),
        *expert_misfits(plan, model, format),
        *_of_cuts(plan, model, format),
    ]


def _of_model(model: nn.Module, format: str) -> Iterator[str]:
    if format in _VANILLA_HF and not is_hf_model(model):
        yield f"a {type(model).__name__} is no model of transformers"
    if format in GRAPHS and generates(model):
        yield f"a {type(model).__name__} generates, with a cache, and the format is for encoders"


def _of_quantizers(plan: Plan, format: str) -> Iterator[str]:
    weights, inputs = _targets(plan, "weight_quantization"), _targets(plan, "activation_quantization")
    if format == "compressed-tensors":
        if not weights and not inputs:
            yield "nothing is quantized"
        for target in (*weights, *inputs):
            if target.kind.is_experts:
                continue
            if target.kind is not ModuleKind.LINEAR and (
                target.kind is not ModuleKind.EMBEDDING or target in inputs
            ):
                yield f"{target.module_name} is a {target.kind}, and the format quantizes nn.Linear only"
                break
        technique = plan.techniques.get("weight_quantization")
        linears = [t for t in weights if t.kind is ModuleKind.LINEAR or t.kind.is_experts]
        if technique is not None and linears and technique.shared.quantization_type == "asymmetric":
            asymmetric = [t for t in linears if t.params.final_bits > 2]
            if asymmetric:
                yield f"{asymmetric[0].module_name} has asymmetric weights, which do not load back"


def _scales(plan: Plan) -> Iterator[str]:
    """Scales that are no `[outputs, groups]`, which is what all formats store."""
    technique = plan.techniques.get("weight_quantization")
    if technique is None:
        return
    shared = technique.shared
    left = ShapesLeft(plan.structures)
    for target in technique.targets:
        after = left.shape(target.param_name, target.shape)
        columns = _matrix(target, after)[1]
        before = _matrix(target, target.shape)[1]
        granularity = shared.granularity_of(target.params)
        grouped = granularity == "per_column_group"
        groups = shared.quantize_groups if granularity in (None, "per_group") else 1
        if granularity == "per_block":
            if after != target.shape:
                yield f"{target.module_name}: blocks that share a scale are cut; use per_channel"
                return
            continue
        if target.kind is ModuleKind.EMBEDDING and granularity in (None, "per_group"):
            continue
        size = shared.group_size_of(target.params) if grouped else before
        if grouped and before > size and before % size:
            yield f"{target.module_name}: its {before} columns are no multiple of group_size {size}"
            return
        if groups > 1 and not _whole_runs(*_matrix(target, target.shape), groups, target.kind):
            yield f"{target.module_name}: quantize_groups {groups} cuts across its rows"
            return
        if after != target.shape and columns != before and (before > size or _splits_rows(target, groups)):
            yield f"{target.module_name}: columns that share a scale are removed one by one; use per_channel"
            return


def _whole_runs(rows: int, columns: int, groups: int, kind: ModuleKind) -> bool:
    run = rows * columns // groups
    if kind.is_transposed:
        return run % rows == 0
    return run % columns == 0 or columns % run == 0


def _splits_rows(target: Target, groups: int) -> bool:
    rows = _matrix(target, target.shape)[0]
    return groups > 1 and (target.kind.is_transposed or groups > rows)


def _matrix(target: Target, shape: tuple[int, ...]) -> tuple[int, int]:
    """Outputs and inputs."""
    if target.kind.is_experts:
        shape = shape[1:]
    if target.kind.is_transposed:
        return shape[1], shape[0]
    return shape[0], math.prod(shape[1:])


def _of_cuts(plan: Plan, model: nn.Module, format: str) -> Iterator[str]:
    if format not in _VANILLA_HF or not plan.structures or not is_hf_model(model):
        return
    structures = [target.structure for block in plan.structures.values() for target in block.targets]
    kept = {name: units for block in plan.structures.values() for name, units in _kept(block)}
    try:
        pruning_plan = PruningPlan.of(structures, kept)
    except ValueError:
        return  # two blocks that the plan has refused already
    yield from (
        f"stock transformers would load another model: {obstacle}"
        for obstacle in vanilla_hf_obstacles(model, pruning_plan)
    )


def _kept(block: StructurePlan) -> Iterator[tuple[str, torch.Tensor]]:
    """Any units, as many as will be kept; under a global scope not the same number everywhere."""
    shared: Any = block.shared
    uneven = shared.scope == "global" and len(block.targets) > 1
    for number, target in enumerate(block.targets):
        group = target.structure
        count = units_left(group, target.dense_ratio, shared) // group.parts
        if uneven and number == 0 and count < group.width:
            count = min(group.width, count + math.lcm(shared.round_to, group.multiple))
        yield group.name, torch.arange(group.units).view(group.parts, -1)[:, :count].flatten()


def _targets(plan: Plan, key: str) -> tuple[Target, ...]:
    technique = plan.techniques.get(key)
    return technique.targets if technique else ()
