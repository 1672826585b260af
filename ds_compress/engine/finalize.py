"""`finalize`: what training has masked is removed, and a smaller, plain model is left."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_compress.config.resolve.resolver import resolve
from ds_compress.config.schema.compression_training import CompressionConfig, parse_config
from ds_compress.config.schema.source import block_of
from ds_compress.config.structure_targets import StructurePlan, StructureTarget, units_left
from ds_compress.engine import record
from ds_compress.engine.admission import require_full_layers
from ds_compress.engine.checkpoint import origin
from ds_compress.engine.registry import run_of
from ds_compress.engine.resize.cut import cut_in_place
from ds_compress.engine.run_end import say_end
from ds_compress.select.gumbel import GumbelNoise, commitments
from ds_compress.select.scores import SCORES
from ds_compress.select.units import top_units, unit_sums
from ds_compress.sharding.shards import Shards
from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.expert_merging import merge_experts
from ds_compress.structure.pruning_plan import PruningPlan
from ds_compress.techniques.masked import noise_of
from ds_compress.techniques.sparse_pruning import SparsePruning

if TYPE_CHECKING:
    from ds_compress.config.targets import TechniquePlan
    from ds_compress.engine.run import CompressionRun


logger = logging.getLogger("ds_compress")


def finalize(
    engine_or_model: Any, config: Mapping[str, Any] | str | PathLike[str] | None = None
) -> nn.Module:
    """Removes the structures that training masked: weights, biases and norms sliced, attributes and config rewritten.

    Args:
        engine_or_model: a DeepSpeed engine with a `compression_training` block, on any ZeRO stage: its training is
            over afterwards, and the model that it trained comes back whole and plain in every process (a
            collective). Or the model of such an engine, or of a training loop with a `compression_scheduler`: the
            masks in force decide likewise. Or a model that was trained elsewhere (a checkpoint of a masked model), or
            not at all: where no step was taken under the block, masks are made now, of the weights as they are.
        config: with a model without a run, the block (or the DeepSpeed config) that it was trained with: it says
            which structures and weights there are, and how many of each are kept; those with the largest weights are.

    Returns:
        The same module object, smaller. Its quantizers, if any, are still attached, so that an export knows them.

    Raises:
        ConfigError: the config does not fit the model. ValueError: an engine without a block, or with
            layers sharded by tensor parallelism; a model without config.
    """
    if hasattr(engine_or_model, "compression"):
        return _finalize_engine(engine_or_model)
    run = run_of(engine_or_model) if isinstance(engine_or_model, nn.Module) else None
    if run is not None:
        return _finalize_engine(run.engine) if run.engine is not None else _finalize_loop(run)
    if not isinstance(engine_or_model, nn.Module) or hasattr(engine_or_model, "module"):
        raise ValueError("finalize: this engine has no compression_training block: nothing was masked")
    if config is None:
        raise ValueError("finalize(model, config): say with which compression_training block it was trained")
    return _finalize_model(engine_or_model, parse_config(block_of(config)))


def redundancy_clean(model: Any, deepspeed_config: Any, mpu: Any = None) -> nn.Module:
    """The legacy name of `finalize`. `mpu` is accepted and not used: `finalize` refuses sharded layers itself."""
    return finalize(model, None if hasattr(model, "compression") else deepspeed_config)


def _finalize_engine(engine: Any) -> nn.Module:
    require_full_layers(engine, "finalize")
    run, model = engine.compression, engine.module
    pruning_plan, untouched = run.pruning_plan(), _is_untouched(run)
    run.refresh_weights()
    say_end(run, "model")
    origin.remember_metrics(run.model, run.metrics())
    origin.remember_commitments(run.model, run.commitments)
    origin.remember_record(run.model, record.of(run))
    run.end()
    cut_in_place(engine, pruning_plan)
    _keep_experts(run, pruning_plan)
    if untouched:
        return _finalize_model(model, _of_weights(run), run.secret_seeds)
    origin.mark(model, [name for name in run.unfinished if name in origin.QUANTIZERS])
    return model


def _finalize_loop(run: CompressionRun) -> nn.Module:
    pruning_plan, untouched = run.pruning_plan(), _is_untouched(run)
    say_end(run, "model")
    origin.remember_metrics(run.model, run.metrics())
    origin.remember_commitments(run.model, run.commitments)
    origin.remember_record(run.model, record.of(run))
    run.end()
    if untouched:
        return _finalize_model(run.model, _of_weights(run), run.secret_seeds)
    apply_pruning(run.model, pruning_plan)
    _keep_experts(run, pruning_plan)
    origin.mark(run.model, [name for name in run.unfinished if name in origin.QUANTIZERS])
    return run.model


def _keep_experts(run: CompressionRun, pruning_plan: PruningPlan) -> None:
    """In the quantizers, which stay on the modules."""
    for technique in run.techniques.values():
        technique.keep_experts(pruning_plan.kept_experts)


def _is_untouched(run: CompressionRun) -> bool:
    """Whether no step was taken and no mask loaded: nothing of what the block asks for has happened yet."""
    return not run.applied_steps and not any(t.has_results for t in run.techniques.values())


def _of_weights(run: CompressionRun) -> CompressionConfig:
    """What of the config the weights alone decide; layers of a teacher are in place since the run began."""
    logger.info(
        "ds_compress: no step was taken under this block: masks are made now, of the weights as they are"
    )
    return run.given.without("layer_reduction", "distillation")


@torch.no_grad()
def _finalize_model(
    model: nn.Module, config: CompressionConfig, secret_seeds: Mapping[str, str] = MappingProxyType({})
) -> nn.Module:
    resolved = resolve(model, config)
    origin.remember(model)

    def noise_for(block: str, shared: Any) -> GumbelNoise | None:
        noise = noise_of(block, shared, config.seed)
        if noise is not None:
            noise.restore({"secret_seed": secret_seeds.get(block)})
            noise.draw(lambda own: Shards.of_model(model).from_first_process(own))
            if noise.secret_seed is not None:
                origin.remember_commitments(model, commitments({block: noise.secret_seed}))
        return noise

    if SparsePruning.name in resolved.techniques:
        plan = resolved.techniques[SparsePruning.name]
        _prune_smallest(model, plan, noise_for(SparsePruning.name, plan.shared))
    kept: dict[str, torch.Tensor] = {}
    for key, structures in resolved.structures.items():
        noise = noise_for(key, structures.shared)
        for target in structures.targets:
            kept[target.structure.name] = _largest_units(model, structures, target, noise)
    for structures in resolved.structures.values():
        if getattr(structures.shared, "merge", False):
            for target in structures.targets:
                merge_experts(model, target.structure, kept[target.structure.name])
    groups = [t.structure for p in resolved.structures.values() for t in p.targets]
    apply_pruning(model, PruningPlan.of(groups, kept))
    origin.mark(model, [name for name in origin.unfinished(model) if name in origin.QUANTIZERS])
    return model


def _prune_smallest(model: nn.Module, plan: TechniquePlan, noise: GumbelNoise | None) -> None:
    """The final masks of `sparse_pruning` by magnitude. A model that was masked already has them, as its zeros."""
    technique = SparsePruning(plan)
    technique.score, technique.noise = SCORES["l1"](), noise
    shards = Shards.of_model(model)
    technique.attach(shards)
    technique.update_masks(max(technique.schedule.begin, technique.schedule.end or 0))
    technique.on_update([shards.fragments[name] for name in technique.masks])


def _largest_units(
    model: nn.Module, structures: StructurePlan, target: StructureTarget, noise: GumbelNoise | None
) -> torch.Tensor:
    structure = target.structure
    parameters = dict(model.named_parameters())
    total = torch.zeros(structure.units, dtype=torch.float64)
    for member in structure.slices:
        if member.scored:
            weight = parameters[member.tensor]
            magnitudes = weight.detach().float().abs().flatten()
            sums = unit_sums(magnitudes, 0, weight.shape, member.dim, member.index, member.of_experts)
            total += sums.to(total.device)
    for unit, layer in enumerate(structure.layers):
        total[unit] = sum(p.detach().double().abs().sum() for p in model.get_submodule(layer).parameters())
    count = units_left(structure, target.dense_ratio, structures.shared)
    scores = total if noise is None else noise.perturbed(total.float(), structure.aligned or structure.name)
    return top_units(scores, count, structure.parts)
