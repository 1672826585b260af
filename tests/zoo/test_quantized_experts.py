"""Fused experts of every architecture, quantized: the same as each expert's matrix quantized for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_compress.quant.qat_module import QATModule
from tests.zoo.expert_reference import blocks, prepared, ranges_from_observed, use_reference
from tests.zoo.mixtures import ARCHITECTURES, mixture, tokens

NAMES = sorted(ARCHITECTURES)
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
_STATIC = {"activation_quantization": {"range_calibration": "static", "narrow_range": True}}
SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16 in groups": blocks(
        {"target_bits": 4, "granularity": "per_column_group", "group_size": 4},
        weight_quantization={"quantize_weight_in_forward": True, "narrow_range": False},
    ),
    "FP8_DYNAMIC": {"scheme": {"FP8_DYNAMIC": ["experts"]}},
    "NVFP4": {"scheme": {"NVFP4": ["experts.*(gate_up_proj|down_proj)"]}},
    "W8A8 static": blocks({"target_bits": 8, "granularity": "per_channel"}, {"bits": 8}, **_STATIC),
}
"""On the legacy grid of the first the largest weight of a group clips, and has no gradient."""


def _mixture(name: str) -> Any:
    widths = {"intermediate_size": 32, "moe_intermediate_size": 32, "intermediate_size_mlp": 32}
    known = {"intermediate_size", *ARCHITECTURES[name][2]}
    return mixture(name, **{key: width for key, width in widths.items() if key in known})


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids).logits
    return logits


def _gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    _logits(model, ids).pow(2).mean().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
def test_as_the_plain_loop_over_experts(name: str, scheme: str) -> None:
    ids = tokens()
    models = [_mixture(name), _mixture(name)]
    for model in models:
        prepared(model, SCHEMES[scheme])
        model.config._experts_implementation = "eager"
    ours, reference = models
    ours.train()
    ours(ids)
    ranges_from_observed(ours)
    ours.eval()
    _same_ranges(ours, reference)
    use_reference(reference)
    expected, expected_grads = _logits(reference, ids), _gradients(reference, ids)
    assert expected.isfinite().all()
    for implementation in IMPLEMENTATIONS:
        ours.config._experts_implementation = implementation
        grads = _gradients(ours, ids)
        assert torch.allclose(_logits(ours, ids), expected, atol=1e-5 * float(expected.detach().std()))
        for parameter, grad in grads.items():
            scale = float(expected_grads[parameter].abs().max())
            assert torch.allclose(grad, expected_grads[parameter], atol=1e-5 * scale), parameter


def _same_ranges(source: nn.Module, target: nn.Module) -> None:
    quantizers = [
        [q for m in model.modules() if isinstance(m, QATModule) for _, q in m.input_quantizers()]
        for model in (source, target)
    ]
    for own, other in zip(*quantizers, strict=True):
        other.input_range = own.input_range
