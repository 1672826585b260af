"""Which formats of an export have no way to say floats: what `compatibility` asks at start, and by the same rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ds_compress.config.targets import inputs_of
from ds_compress.export import trial_load
from ds_compress.export.compressed_tensors.floats import COMPRESSORS, PACKED
from ds_compress.export.compressed_tensors.inputs import FLOATS
from ds_compress.export.format import is_hf_model
from ds_compress.export.graph_format import GRAPHS
from ds_compress.modelinfo.kinds import ModuleKind

if TYPE_CHECKING:
    from ds_compress.config.report.plan import Plan
    from ds_compress.config.targets import Target

_INTEGERS = "int"


def float_misfits(plan: Plan, model: nn.Module, format: str) -> Iterator[str]:
    """Sentences that name the module."""
    weights, inputs = _floats(plan, "weight_quantization"), _floats(plan, "activation_quantization")
    if format in GRAPHS:
        for target in (*weights, *inputs)[:1]:
            yield f"{target.module_name} is quantized to {target.params.format}, and the format stores integers only"
    if format == "compressed-tensors":
        linears = [target for target in weights if target.kind is ModuleKind.LINEAR]
        yield from _of_weights(plan, [*linears, *(target for target in weights if target.kind.is_experts)])
        yield from _of_inputs(plan, inputs)
        packed = [target.module_name for target in linears if target.params.format in PACKED]
        if packed and is_hf_model(model) and not trial_load.loads_packed(model, packed):
            yield f"{packed[0]}: a {type(model).__name__} does not load packed weights"


def _floats(plan: Plan, key: str) -> list[Target]:
    technique = plan.techniques.get(key)
    targets = technique.targets if technique else ()
    return [target for target in targets if target.params.format != _INTEGERS]


def _of_weights(plan: Plan, linears: list[Target]) -> Iterator[str]:
    for target in linears:
        format = target.params.format
        shared: Any = plan.techniques["weight_quantization"].shared
        in_groups = shared.granularity_of(target.params) in ("per_column_group", "per_block")
        size = shared.group_size_of(target.params)
        if format not in COMPRESSORS:
            yield f"{target.module_name} is quantized to {format}, which stock tools do not read"
            return
        if in_groups and inputs_of(target) % size:
            yield f"{target.module_name}: its {inputs_of(target)} columns are no multiple of {size}, a block"
            return


def _of_inputs(plan: Plan, inputs: list[Target]) -> Iterator[str]:
    for target in inputs:
        shared: Any = plan.techniques["activation_quantization"].shared
        if target.params.format not in FLOATS or shared.granularity_of(target.params) == "per_sample":
            yield f"inputs of {target.module_name} are quantized to {target.params.format}, which it cannot say"
            return
