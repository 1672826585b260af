"""Which quantized experts an export has no way to say: what `compatibility` asks at start, and by the same rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ds_compress.config.targets import inputs_of
from ds_compress.export.compressed_tensors.experts import FUSED_ON_HUB, INSTEAD, has_single_matrices, misread
from ds_compress.export.format import is_hf_model
from ds_compress.export.graph_format import GRAPHS
from ds_compress.export.hub_names import hub_names
from ds_compress.modelinfo.experts import fused_experts

if TYPE_CHECKING:
    from ds_compress.config.report.plan import Plan
    from ds_compress.config.targets import Target


def expert_misfits(plan: Plan, model: nn.Module, format: str) -> Iterator[str]:
    """Sentences that name the module."""
    weights, inputs = _experts(plan, "weight_quantization"), _experts(plan, "activation_quantization")
    if format in GRAPHS and (weights or inputs):
        first = [*weights, *inputs][0]
        yield f"{first.module_name} is a matrix of fused experts, which the format does not quantize"
    if format != "compressed-tensors" or not is_hf_model(model) or not (weights or inputs):
        return
    used = {target.param_name: target for target in inputs}
    missing = sorted({target.param_name for target in inputs} - {target.param_name for target in weights})
    if missing:
        yield f"{missing[0]}: inputs of experts are quantized whose weights are not"
        return
    converter = hub_names(model)
    for target in weights:
        if not has_single_matrices(converter, target.param_name, target.shape, target.kind):
            yield f"{target.param_name}: {FUSED_ON_HUB}"
            return
        reason = _misread(plan, target, used.get(target.param_name))
        if reason is not None:
            yield f"{target.param_name}: {reason}; {INSTEAD}"
            return
    yield from _not_alike(model, weights, inputs)


def _misread(plan: Plan, target: Target, used: Target | None) -> str | None:
    shared: Any = plan.techniques["weight_quantization"].shared
    in_blocks = shared.granularity_of(target.params) == "per_block"
    size = shared.group_size_of(target.params) if in_blocks else 0
    outputs = target.shape[2 if target.kind.is_transposed else 1]
    several = in_blocks and max(outputs, inputs_of(target)) > size
    integer_inputs = used is not None and used.params.format == "int"
    static = used is not None and _is_static(plan, used)
    return misread(target.params.format, target.params.final_bits, several, integer_inputs, static)


def _is_static(plan: Plan, used: Target) -> bool:
    shared: Any = plan.techniques["activation_quantization"].shared
    return bool(shared.calibration_of(used.params) == "static")


def _not_alike(model: nn.Module, weights: list[Target], inputs: list[Target]) -> Iterator[str]:
    """transformers reads all experts of a model by one scheme."""
    stacks = [
        f"{name}.{matrix}"
        for name, module in model.named_modules()
        if (layout := fused_experts(module)) is not None
        for matrix in layout.matrices
    ]
    ways = {repr(target.params) for target in weights}
    if len(ways) > 1 or len(weights) < len(stacks):
        yield (
            f"{weights[0].param_name}: not all matrices of experts are quantized alike, and stock transformers reads "
            "all of them by one scheme; quantize both matrices of all experts in one way, or none"
        )
    used = {repr(target.params) for target in inputs}
    if len(used) > 1 or (inputs and len(inputs) < len(weights)):
        yield f"{inputs[0].param_name}: inputs of experts are quantized in several ways; quantize all alike"


def _experts(plan: Plan, key: str) -> list[Target]:
    technique = plan.techniques.get(key)
    return [target for target in technique.targets if target.kind.is_experts] if technique else []
