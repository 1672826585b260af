"""Mixtures whose experts are quantized the plain way: a loop over experts, each matrix a layer of its own."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ds_compress import plan
from ds_compress.modelinfo.experts import FusedExperts, fused_experts
from ds_compress.quant import layers
from ds_compress.quant.experts import QATExperts
from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.fake_quantized_linear import fake_quantized_linear
from ds_compress.quant.linear_ops import Conv1dOp, DenseOp
from ds_compress.techniques import TECHNIQUES
from ds_compress.techniques.base import Technique

Block = dict[str, Any]


def blocks(weights: Block | None, inputs: Block | None = None, **shared: Block) -> Block:
    """`compression_training` for all that a group with these `params` reaches; shared: `shared_parameters` by key."""
    made: Block = {}
    for key, params in (("weight_quantization", weights), ("activation_quantization", inputs)):
        if params is not None:
            own = {"enabled": True, **shared.get(key, {})}
            made[key] = {"shared_parameters": own, "different_groups": {"g": {"params": params}}}
    return made


def prepared(model: nn.Module, block: Block) -> dict[str, Technique]:
    """The model with the techniques of the block on it."""
    found: dict[str, Technique] = {}
    for key, technique in plan(model, block).techniques.items():
        found[key] = TECHNIQUES[key](technique, 0)  # type: ignore[call-arg]
        found[key].prepare(model)
    return found


def use_reference(model: nn.Module) -> None:
    """Every quantized experts module of the model, routed with (token, expert) pairs, computes the plain way."""
    for module in model.modules():
        if isinstance(module, QATExperts):
            fused = fused_experts(module)
            assert fused is not None
            forward = _llama4_forward if "Llama4" in type(module).__name__ else _forward
            vars(module)["forward"] = types.MethodType(_bound(forward, fused), module)


def _bound(forward: Any, fused: FusedExperts) -> Any:
    return lambda self, *args: forward(self, fused, *args)


def _product(self: Any, fused: FusedExperts, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    biases: Mapping[str, Any] = self._parameters
    bias = biases[f"{name}_bias"][expert] if f"{name}_bias" in fused.biases else None
    config = self._fake_quant(name)
    if config is not None:
        own = config.global_scale
        config = FakeQuantConfig(
            replace(config.grid, stacked=False),
            clipped_ste=config.clipped_ste,
            global_scale=None if own is None else own[expert : expert + 1],
        )
    grid = given = None
    quantizer = dict(self.input_quantizers()).get(name)
    if quantizer is not None:
        grid = quantizer.grid
        given = None if quantizer.input_range is None else quantizer.input_range[expert]
        if grid.static and (given is None or bool(given.isnan().any())):
            grid = given = None
    op = Conv1dOp() if fused.transposed else DenseOp()
    weight = self._parameters[name][expert]
    return fake_quantized_linear(x, weight, bias, op, config, grid, None, given)


def _forward(
    self: Any, fused: FusedExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(hidden)
    for expert in range(fused.experts):
        token, place = torch.where(index == expert)
        if not len(token):
            continue
        inner = _product(self, fused, fused.up, expert, hidden[token])
        inner = self._apply_gate(inner) if fused.has_gate else self.act_fn(inner)
        y = _product(self, fused, fused.down, expert, inner)
        out = out.index_add(0, token, y * weights[token, place, None])
    return out


def _llama4_forward(self: Any, fused: FusedExperts, hidden: torch.Tensor) -> torch.Tensor:
    outputs = []
    for expert, x in enumerate(hidden.view(fused.experts, -1, fused.hidden)):
        gate, up = _product(self, fused, fused.up, expert, x).chunk(2, dim=-1)
        outputs.append(_product(self, fused, fused.down, expert, up * self.act_fn(gate)))
    return torch.cat(outputs)


def ranges_from_observed(model: nn.Module) -> None:
    """Static inputs get the range of what they have seen."""
    for module in model.modules():
        if not isinstance(module, layers.QATModule):
            continue
        for _, quantizer in module.input_quantizers():
            if quantizer.observed is not None:
                seen = quantizer.observed * torch.tensor([-1.0, 1.0])
                quantizer.input_range = torch.where(seen.isfinite(), seen, torch.nan)
                quantizer.observed = None
