"""An engine constructed anew in mid-training, around a model that has lost units or got them back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ds_compress.engine.build import with_techniques
from ds_compress.engine.construction import adopt, construct
from ds_compress.engine.resize.uncut import Uncut
from ds_compress.engine.run import CompressionRun
from ds_compress.engine.zero import parameters
from ds_compress.structure.pruning_plan import PruningPlan


def rebuild_smaller(
    run: CompressionRun, engine: Any, made: Mapping[int, nn.Parameter | None], pruning_plan: PruningPlan
) -> CompressionRun:
    """The run of the model after `pruning_plan`, attached to `engine`, which is constructed here.

    made: the new parameter for the id of each old one. What removes units or layers is done; other techniques start
    with the replicated state that they have in `run`.
    """
    arguments = {**run.construction.arguments, "training_data": None}
    parameters.replace_parameters(arguments, run.construction.client_groups, made)
    with run.kernels:
        successor = with_techniques(arguments["model"], run.given, run.config.after_shrink(), None)
    successor.kernels, successor.history, successor.loss = run.kernels, run.history, run.loss
    adopt(successor, arguments)
    successor.teacher = run.teacher
    successor.shrunk_units = run.kept_units
    removed = _removed_layers(run)
    for name, technique in run.techniques.items():
        if technique.survives_shrink:
            technique.drop_layers(removed)
            successor.techniques[name] = technique
    successor.ended_metrics, successor.ended_seeds = run.metrics(), run.secret_seeds
    _follow(successor, run)
    construct(successor, engine, arguments, run.construction.constructor, run.construction.attach)
    successor.start_at(run.applied_steps)
    renamed = _renamed_modules(pruning_plan)
    for technique in run.techniques.values():
        technique.keep_experts(pruning_plan.kept_experts)
    for name, technique in successor.techniques.items():
        technique.load_state_dict(run.techniques[name].renamed_state(renamed))
    return successor


def rebuild_full(run: CompressionRun, engine: Any, uncut: Uncut) -> CompressionRun:
    """The run of the model that a shrink has cut and that is full again, attached to `engine`, constructed here."""
    arguments = {**run.construction.arguments, "training_data": None}
    model: nn.Module = arguments["model"]
    uncut.into(arguments, model)
    with run.kernels:
        successor = with_techniques(model, run.given, run.given, run.teacher)
    successor.kernels, successor.history, successor.loss = run.kernels, run.history, run.loss
    adopt(successor, arguments)
    _follow(successor, run)
    construct(successor, engine, arguments, run.construction.constructor, run.construction.attach)
    return successor


def _follow(successor: CompressionRun, run: CompressionRun) -> None:
    successor.outcome = run.outcome
    for name, technique in successor.techniques.items():
        if name in run.techniques and technique is not run.techniques[name]:
            technique.follow(run.techniques[name])


def _removed_layers(run: CompressionRun) -> set[str]:
    """Names of the layer modules that no mask keeps."""
    kept = run.kept_units
    removed: set[str] = set()
    for name, group in run.prunable_groups.items():
        if group.layers and name in kept:
            removed |= set(group.layers) - {group.layers[unit] for unit in kept[name].tolist()}
    return removed


def _renamed_modules(pruning_plan: PruningPlan) -> Callable[[str], str | None]:
    def renamed(module: str) -> str | None:
        parameter = pruning_plan.renamed(f"{module}.weight")
        return None if parameter is None else parameter.removesuffix(".weight")

    return renamed
