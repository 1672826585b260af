"""What float formats need of the weights, the layers and the blocks beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ds_compress.config.schema.formats import INTEGERS
from ds_compress.config.targets import Target, TechniquePlan, inputs_of
from ds_compress.errors import Problem, dotted, shown
from ds_compress.modelinfo.inventory import covering_patterns, few
from ds_compress.modelinfo.kinds import ModuleKind
from ds_compress.quant.fp8_linear import MULTIPLE

_WEIGHTS, _INPUTS = "weight_quantization", "activation_quantization"
_KERNEL = dotted(_WEIGHTS, "shared_parameters", "kernel")
_CODES = "fp8_e4m3"


def of_weights(key: str, shared: Any, targets: Sequence[Target]) -> Iterator[Problem]:
    """Weights whose inputs a block of their format does not divide, and kinds of layers without such blocks."""
    floats = [target for target in targets if target.params.format != INTEGERS]
    yield from _uneven(key, [(t, shared.group_size_of(t.params)) for t in floats if _in_groups(shared, t)])
    yield from _convolutions(
        key, [t for t in floats if shared.granularity_of(t.params) in ("per_column_group", "per_block")]
    )
    squares = [t for t in floats if shared.granularity_of(t.params) == "per_block"]
    tables = [target for target in squares if target.kind is ModuleKind.EMBEDDING]
    if tables:
        yield Problem(
            dotted(key, "different_groups", tables[0].group, "params", "granularity"),
            f'"per_block" with the embedding {tables[0].module_name}',
            "another granularity for embeddings: a square cuts across rows, which are looked up one by one",
            'give them a group of their own with "per_channel"',
        )


def of_inputs(key: str, shared: Any, targets: Sequence[Target]) -> Iterator[Problem]:
    """The same of layers whose inputs are rounded in blocks."""
    grouped = [
        (target, shared.group_size_of(target.params))
        for target in targets
        if shared.granularity_of(target.params) == "per_token_group"
    ]
    yield from _uneven(key, grouped)
    yield from _convolutions(key, [target for target, _ in grouped])


def _in_groups(shared: Any, target: Target) -> bool:
    return shared.granularity_of(target.params) == "per_column_group"


def _uneven(key: str, grouped: Sequence[tuple[Target, int]]) -> Iterator[Problem]:
    uneven = [(t, size) for t, size in grouped if inputs_of(t) % size and t.kind is not ModuleKind.CONV2D]
    if uneven:
        target, size = uneven[0]
        excluded = ", ".join(shown(p) for p in covering_patterns(t.module_name for t, _ in uneven))
        names = few([f"{t.module_name} ({inputs_of(t)} inputs)" for t, _ in uneven])
        yield Problem(
            dotted(key, "different_groups", target.group, "params", "format"),
            f"{shown(target.params.format)} with {names}",
            f"layers whose inputs are a multiple of {size}: so many share a scale",
            f"add {excluded} to shared_parameters.excluded_modules, or give such "
            'layers a group with "fp8_e4m3"',
        )


def _convolutions(key: str, targets: Sequence[Target]) -> Iterator[Problem]:
    images = [target for target in targets if target.kind is ModuleKind.CONV2D]
    if images:
        yield Problem(
            dotted(key, "different_groups", images[0].group, "params", "format"),
            f"{shown(images[0].params.format)} with {few([t.module_name for t in images])} (Conv2d)",
            "a format without blocks for Conv2d: blocks lie along the inputs of a matrix",
            'use "fp8_e4m3" or integers, or exclude these layers',
        )


def of_fp8_products(techniques: Mapping[str, TechniquePlan]) -> Iterator[Problem]:
    """Everything that keeps layers from multiplying FP8 codes although `kernel` wants it."""
    weights, inputs = techniques.get(_WEIGHTS), techniques.get(_INPUTS)
    if weights is None or weights.shared.kernel != "fp8":
        return
    if inputs is None:
        yield Problem(
            _KERNEL,
            '"fp8"',
            '"float", unless activation_quantization is enabled: codes are multiplied with codes',
            'add an "activation_quantization" block with "format": "fp8_e4m3", or set kernel to "float"',
        )
        return
    layers = [target for target in weights.targets if target.kind is not ModuleKind.EMBEDDING]
    claims = {target.module_name: target for target in inputs.targets}
    for layer in layers:
        own = claims.get(layer.module_name)
        if not _multiplies(_WEIGHTS, weights.shared, layer):
            what = "weight"
        elif own is None or not _multiplies(_INPUTS, inputs.shared, own):
            what = "input"
        else:
            continue
        yield Problem(
            _KERNEL,
            f'"fp8" with {layer.module_name}, whose {what} has no codes for it',
            'Linear layers with "fp8_e4m3" weights per channel or tensor, "fp8_e4m3" inputs per token or '
            f"tensor, and sizes that are multiples of {MULTIPLE}",
            'set kernel to "float", or exclude the layer from both blocks',
        )
        return


def _multiplies(block: str, shared: Any, target: Target) -> bool:
    allowed = ("per_channel", "per_tensor") if block == _WEIGHTS else ("per_token", "per_tensor")
    return (
        target.kind is ModuleKind.LINEAR
        and not any(size % MULTIPLE for size in target.shape)
        and target.params.format == _CODES
        and shared.granularity_of(target.params) in allowed
    )
