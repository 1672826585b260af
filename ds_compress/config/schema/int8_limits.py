"""What `weight_quantization.shared_parameters.kernel: "int8"` needs of the rest of the config and of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ds_compress.config.targets import Target, TechniquePlan, inputs_of
from ds_compress.errors import Problem, dotted, shown
from ds_compress.modelinfo.inventory import covering_patterns, exact_pattern, few
from ds_compress.modelinfo.kinds import ModuleKind

_WEIGHTS, _INPUTS = "weight_quantization", "activation_quantization"
_PATH = dotted(_WEIGHTS, "shared_parameters", "kernel")
_BITS_OF_CODES = 8
_MOST_OUTPUTS = (2**31 - 1) // (128 * 127)


def problems(techniques: Mapping[str, TechniquePlan]) -> Iterator[Problem]:
    """Everything that keeps layers from multiplying codes although the config wants it."""
    weights, inputs = techniques.get(_WEIGHTS), techniques.get(_INPUTS)
    if weights is None or weights.shared.kernel != "int8":
        return
    if inputs is None:
        yield Problem(
            _PATH,
            '"int8"',
            '"float", unless activation_quantization is enabled: integers are multiplied with integers',
            'add an "activation_quantization" block, or set kernel to "float"',
        )
        return
    for block in (weights, inputs):
        if block.shared.quantization_type != "symmetric":
            yield Problem(
                dotted(block.block, "shared_parameters", "quantization_type"),
                shown(block.shared.quantization_type),
                '"symmetric", because weight_quantization has kernel "int8"',
            )
    layers = [target for target in weights.targets if target.kind is not ModuleKind.EMBEDDING]
    floats = [t for t in (*layers, *inputs.targets) if t.params.format != "int"]
    if floats:
        yield Problem(
            _PATH,
            f'"int8" with {few([t.module_name for t in floats])}, in {floats[0].params.format}',
            '"float" or "fp8" where a format is not "int"',
            'set kernel to "float"',
        )
        return
    yield from _not_matrices(layers)
    yield from _not_single(layers)
    layers = [target for target in layers if not target.kind.is_experts]
    yield from _inputs_not_in_codes([t for t in layers if t.kind is not ModuleKind.CONV2D], inputs)
    yield from _scales_inside_channels(layers, weights)
    if weights.shared.backward == "int8":
        yield from _sums_too_long(layers)


def _not_matrices(layers: list[Target]) -> Iterator[Problem]:
    convolutions = [target.module_name for target in layers if target.kind is ModuleKind.CONV2D]
    if convolutions:
        yield Problem(
            _PATH,
            f'"int8" with {few(convolutions)} (Conv2d)',
            '"float" where a Conv2d is quantized: the int8 product is for Linear and Conv1D',
            f"add {shown(exact_pattern(convolutions[0]))} to shared_parameters.excluded_modules, or use "
            '"float"',
        )


def _not_single(layers: list[Target]) -> Iterator[Problem]:
    experts = [target.module_name for target in layers if target.kind.is_experts]
    if experts:
        patterns = ", ".join(shown(pattern) for pattern in covering_patterns(experts))
        yield Problem(
            _PATH,
            f'"int8" with {few(experts)} (experts)',
            '"float" where fused experts are quantized: training has no int8 product for several matrices at once',
            f'set kernel to "float", or add {patterns} to shared_parameters.excluded_modules',
        )


def _inputs_not_in_codes(layers: list[Target], inputs: TechniquePlan) -> Iterator[Problem]:
    claims = {target.module_name: target for target in inputs.targets}
    bare = [target.module_name for target in layers if target.module_name not in claims]
    if bare:
        yield Problem(
            _PATH,
            f'"int8" with {few(bare)}, whose input is not quantized',
            "layers that activation_quantization claims too",
            "let activation_quantization claim them, or exclude them from weight_quantization",
        )
    others = {claims[t.module_name].group: claims[t.module_name] for t in layers if t.module_name in claims}
    for group, target in others.items():
        if target.params.final_bits != _BITS_OF_CODES:
            yield Problem(
                dotted(_INPUTS, "different_groups", group, "params", "bits"),
                str(target.params.final_bits),
                f'{_BITS_OF_CODES}, because weight_quantization has kernel "int8"',
            )


def _sums_too_long(layers: list[Target]) -> Iterator[Problem]:
    """The gradient of an input is a sum over all outputs."""
    wide = [t for t in layers if math.prod(t.shape) // inputs_of(t) > _MOST_OUTPUTS]
    if wide:
        yield Problem(
            dotted(_WEIGHTS, "shared_parameters", "backward"),
            f'"int8" with {few([t.module_name for t in wide])}, of more than {_MOST_OUTPUTS:,} outputs',
            '"float" where sums over outputs may overflow 32 bits',
            f'add {shown(exact_pattern(wide[0].module_name))} to shared_parameters.excluded_modules, or use "float"',
        )


def _scales_inside_channels(layers: list[Target], weights: TechniquePlan) -> Iterator[Problem]:
    shared = weights.shared
    grouped = [t for t in layers if t.params.granularity == "per_column_group"]
    one_channel = "one scale for each output channel, or for several: the int8 product scales whole sums"
    if grouped:
        yield Problem(
            dotted(_WEIGHTS, "different_groups", grouped[0].group, "params", "granularity"),
            '"per_column_group"',
            one_channel,
            'set granularity to "per_channel"',
        )
    if shared.granularity == "per_column_group":
        yield Problem(
            dotted(_WEIGHTS, "shared_parameters", "granularity"),
            '"per_column_group"',
            one_channel,
            'set granularity to "per_channel"',
        )
    elif shared.granularity in (None, "per_group") and shared.quantize_groups > 1:
        cut = [
            target.module_name
            for target in layers
            if target.kind is ModuleKind.CONV1D
            or math.prod(target.shape) // shared.quantize_groups % inputs_of(target)
        ]
        if cut:
            yield Problem(
                dotted(_WEIGHTS, "shared_parameters", "quantize_groups"),
                f"{shared.quantize_groups}, which cuts through output channels of {few(cut)}",
                one_channel,
                'set granularity to "per_channel", or quantize_groups to 1',
            )
