"""What the trained model computes, for the comparison with the one that its export is loaded as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ds_compress.export import kv_cache, ptq
from ds_compress.export.check import Expected
from ds_compress.export.exact import in_fp32, is_sharded
from ds_compress.export.fingerprint import Fingerprint
from ds_compress.export.format import Format
from ds_compress.export.inputs import exact_activations, run
from ds_compress.export.source import ExportSource
from ds_compress.quant import layers


def expected_of(
    source: ExportSource,
    format: Format,
    inputs: Mapping[str, torch.Tensor],
    rounded_inputs: Sequence[str],
    fingerprints: Mapping[str, Fingerprint],
) -> Expected:
    """A collective where weights are sharded.

    rounded_inputs: layers whose inputs only the export rounds; those of the writing process count.
    """
    model = source.model
    changed = source.changed(format.rounded)
    before = None
    if source.share(bool(format.rounded)):
        cache = kv_cache.full_precision_cache(model)
        with cache, in_fp32(model, format.rounds_plain_to), exact_activations(model):
            before = run(model, inputs, torch.float32)
    with kv_cache.full_precision_cache(model), in_fp32(model, format.rounds_plain_to), changed:
        rounded, ignored = source.share((list(rounded_inputs), format.ignored_inputs))
        with ptq.inputs_rounded(model, rounded, format.scheme), exact_activations(model, ignored):
            logits = run(model, inputs, torch.float32)
        with exact_activations(model):
            exact = run(model, inputs, torch.float32)
    rounding = 0.0
    if is_sharded(model) and dtype_of(model) is not torch.float32:
        # A module may ask for the dtype of weights before they are converted, and round what it gives them.
        with kv_cache.full_precision_cache(model), source.changed(format.rounded), exact_activations(model):
            rounding = float((run(model, inputs) - exact).abs().max())
    return Expected(
        inputs,
        exact if format.ignores_inputs else logits,
        exact,
        _rounded_to(format, model),
        rounding,
        same_activations=format.same_activations,
        fingerprints=fingerprints,
        rounding_cost=None if before is None else float((before - exact).abs().max()),
    )


def _rounded_to(format: Format, model: nn.Module) -> torch.dtype:
    """The dtype to which the export rounds what the trained model was not given to compute with."""
    if format.rounded and is_sharded(model):
        return dtype_of(model)
    loaded = format.rounds_plain_to or dtype_of(model)
    is_rounded = is_quantized(model) and (format.name == "hf" or format.rounds_weights)
    # Values of a weight that is stored twice, once rounded, are one in the trained model.
    is_rounded = is_rounded or bool(format.rounds_plain_to and (format.untied or _quantizes_tables(model)))
    return loaded if is_rounded else torch.float32


def is_quantized(model: nn.Module) -> bool:
    """Whether a weight or an input of the model is quantized now."""
    return any(
        layers.quantized_parameters(module)
        or any(quantizer.enabled for quantizer in layers.input_quantizers_of(module).values())
        for module in model.modules()
    )


def _quantizes_tables(model: nn.Module) -> bool:
    return any(isinstance(m, nn.Embedding) and layers.fake_quant_of(m) for m in model.modules())


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of its first floats."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
