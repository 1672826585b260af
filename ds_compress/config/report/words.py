"""The blocks of a plan in words: what they do, to how much, from which step to which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ds_compress.config.resolve.structures import StructurePlan, StructureTarget, kept_units
from ds_compress.config.schema.activation_quantization import ActivationQuantizationShared
from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.config.schema.distillation import Distillation
from ds_compress.config.schema.gradient_compression import GradientCompression, Wire
from ds_compress.config.schema.layer_reduction import LayerReduction
from ds_compress.config.schema.parameter_compression import ParameterCompression
from ds_compress.config.schema.robust_reduction import RobustReduction
from ds_compress.config.schema.sparse_pruning import SparsePruningShared
from ds_compress.config.schema.structured_pruning import StructuredShared
from ds_compress.config.schema.weight_quantization import WeightQuantizationShared
from ds_compress.config.targets import Target
from ds_compress.modelinfo.kinds import ModuleKind


def pruning_cell(target: Target, shared: SparsePruningShared) -> str:
    """E.g. "50% kept, steps 100-900"."""
    return f"{target.params.dense_ratio:.4g} kept, {_pruning_steps(shared)}"


def weight_bits_cell(target: Target, shared: WeightQuantizationShared) -> str:
    """E.g. "8 -> 4 bits, per_channel, steps 0-150"."""
    params = target.params
    schedule = f"{params.start_bits} -> " if params.first_bits != params.target_bits else ""
    end = params.last_drop(shared.schedule_offset)
    when = _steps(shared.schedule_offset, end)
    return f"{schedule}{params.target_bits} bits, {_granularity(target, shared)}, {when}"


def activation_bits_cell(target: Target, offset: int) -> str:
    """E.g. "8 bits, from step 0"."""
    return f"{target.params.bits} bits, {_steps(offset)}"


def structure_lines(plans: Mapping[str, StructurePlan]) -> Iterator[tuple[str, str]]:
    """(key of the block, what it does) of each enabled structured-pruning block."""
    for key, plan in plans.items():
        shared = plan.shared
        facts = [f"method {shared.method}", _pruning_steps(shared)]
        if shared.scope == "global":
            facts.append("units of all structures compete")
        if shared.effective_schedule != "constant":
            facts.append(f"{shared.effective_schedule} schedule")
        if shared.shrink_at_end_of_schedule:
            facts.append("then removed from model and optimizer")
        yield key, f"{_plural(len(plan.targets), 'structure')}: {', '.join(facts)}"


def units_cell(target: StructureTarget, plan: StructurePlan) -> str:
    """E.g. "768 of 1,536 rows"."""
    units = target.structure.units
    kept = kept_units(target.dense_ratio, units, plan.shared.round_to, plan.shared.rounds_up)
    only_zeroed = "" if target.structure.removable else ", the others zero"
    return f"{kept:,} of {_plural(units, str(plan.kind))}{only_zeroed}"


def block_lines(config: CompressionConfig, techniques: dict[str, int]) -> Iterator[tuple[str, str]]:
    """(key of the block, what it does) of each enabled block; `techniques` counts the claimed weights."""
    facts: dict[str, Callable[[Any], str]] = {
        "sparse_pruning": _pruning_facts,
        "weight_quantization": _weight_facts,
        "activation_quantization": _activation_facts,
    }
    for key, count in techniques.items():
        noun = "input" if key == "activation_quantization" else "weight"
        yield key, f"{_plural(count, noun)}: {facts[key](getattr(config, key).shared_parameters)}"
    if config.layer_reduction and config.layer_reduction.enabled:
        yield "layer_reduction", _layer_reduction_facts(config.layer_reduction)
    if config.distillation and config.distillation.enabled:
        yield "distillation", _distillation_facts(config.distillation)
    if config.gradient_compression and config.gradient_compression.enabled:
        yield "gradient_compression", _gradient_facts(config.gradient_compression)
    if config.parameter_compression and config.parameter_compression.enabled:
        yield "parameter_compression", _parameter_facts(config.parameter_compression)
    if config.robust_reduction and config.robust_reduction.enabled:
        yield "robust_reduction", _robust_facts(config.robust_reduction)


def _pruning_facts(shared: SparsePruningShared) -> str:
    scope = {
        "layer": "each weight keeps its ratio",
        "group": "one threshold per group",
        "global": "one threshold over all groups",
    }[shared.scope]
    facts = [f"method {shared.method}", f"pattern {shared.effective_pattern}", scope]
    if shared.effective_schedule != "constant":
        facts.append(f"{shared.effective_schedule} schedule")
    if shared.schedule_offset_end is not None or shared.effective_regrowth:
        facts.append(f"a new mask every {_plural(shared.schedule_offset_stride, 'step')}")
    if shared.effective_regrowth:
        facts.append("masked weights may come back")
    return ", ".join(facts)


def _weight_facts(shared: WeightQuantizationShared) -> str:
    where = "fake quantization in forward" if shared.quantize_weight_in_forward else "rounded after each step"
    grid = "narrow grid" if shared.effective_narrow_range else "legacy grid"
    if shared.quantization_type == "asymmetric" and shared.narrow_range is None and "legacy" in grid:
        grid += ", narrow for pruned weights"
    facts = [shared.quantization_type, f"{shared.rounding} rounding", grid, where]
    if shared.learned_scale:
        facts.append("learned scales")
    if shared.fp16_mixed_quantize.enabled:
        facts.append(f"faded in by {shared.fp16_mixed_quantize.quantize_change_ratio:g} per step")
    return ", ".join(facts)


def _activation_facts(shared: ActivationQuantizationShared) -> str:
    grid = "narrow grid" if shared.effective_narrow_range else "legacy grid"
    ranges = f"{shared.range_calibration} ranges {shared.effective_granularity}"
    return ", ".join([shared.quantization_type, grid, ranges])


def _layer_reduction_facts(block: LayerReduction) -> str:
    where = f" under {block.module_name_prefix}" if block.module_name_prefix else ""
    if block.teacher_layer:
        layers = ", ".join(map(str, block.teacher_layer))
        facts = f"keeps {_plural(len(block.teacher_layer), 'layer')}{where}, from teacher layers {layers}"
    else:
        facts = (
            f"keeps {_plural(block.keep_number_layer or 0, 'layer')}{where}, spread evenly over the teacher"
        )
    copied = (
        ", ".join(block.other_module_name) if block.other_module_name else "all other modules that both have"
    )
    return f"{facts}; copies {copied}"


def _distillation_facts(block: Distillation) -> str:
    losses = [f"task x {block.task_loss_weight:g}"]
    for name, loss in block.losses.active().items():
        end = "" if loss.final_weight is None else f" to {loss.final_weight:g}"
        kind = getattr(loss, "kind", None)
        losses.append(f"{name} x {loss.weight:g}{end}" + (f" ({kind})" if kind else ""))
    return f"{_teacher(block)}; loss = {' + '.join(losses)}"


def _teacher(block: Distillation) -> str:
    if block.self_teacher is not None:
        return f"teacher: the model itself ({block.self_teacher.weights})"
    if block.teacher_cache is not None:
        return f"teacher: what {block.teacher_cache} stores"
    teacher = block.teacher or "the model passed to ds_compress.initialize"
    dtype = f" in {block.teacher_dtype}" if block.teacher_dtype else ""
    return f"teacher {teacher}{dtype} at ZeRO stage {block.teacher_zero_stage}"


def _gradient_facts(block: GradientCompression) -> str:
    facts = ["gradients", *_wire_facts(block)]
    if block.rounding == "stochastic":
        facts.append("stochastic rounding")
    if block.effective_error_feedback_bits:
        facts.append(f"error feedback in {block.effective_error_feedback_bits} bits")
    if block.hierarchical:
        facts.append("full precision inside a host")
    return ", ".join(facts)


def _parameter_facts(block: ParameterCompression) -> str:
    return ", ".join(
        ["weights", *_wire_facts(block), f"exact every {_plural(block.refresh_interval, 'step')}"]
    )


def _wire_facts(block: Wire) -> Iterator[str]:
    yield f"{block.bits} bits on the wire in blocks of {block.effective_block_size}"
    if block.warmup_steps:
        yield _steps(block.warmup_steps)
    if block.measure_link:
        yield "if the link is slow enough to gain"


def _robust_facts(block: RobustReduction) -> str:
    what = f"momenta ({block.worker_momentum:g})" if block.worker_momentum else "gradients"
    mixed = ", mixed with their nearest," if block.neighbor_mixing and block.rule != "mean" else ""
    return (
        f"{block.rule} of the {what} of all workers{mixed} up to {block.max_malicious} of them bad; outliers "
        f"({block.outlier_ratio:g} times the median norm): {block.on_outlier}"
    )


def _pruning_steps(shared: SparsePruningShared | StructuredShared) -> str:
    return _steps(shared.schedule_offset, shared.schedule_offset_end)


def _steps(begin: int, end: int | None = None) -> str:
    return f"from step {begin}" if end is None or end <= begin else f"steps {begin}-{end}"


def _granularity(target: Target, shared: WeightQuantizationShared) -> str:
    if shared.granularity == "per_column_group":
        return f"per {shared.effective_group_size} columns"
    if shared.granularity not in (None, "per_group"):
        return str(shared.granularity)
    if target.kind is ModuleKind.EMBEDDING:
        return "per row"
    return f"{_plural(shared.quantize_groups, 'group')}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
