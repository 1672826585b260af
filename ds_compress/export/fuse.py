"""Layers that run as one kernel: an activation behind a linear layer, and linear layers that share their input.

Both compute what the separate layers do. Patterns are attributes of one module, by the names that transformers uses;
`export` checks the loaded, fused model, and `tests/zoo` every architecture fused against not fused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ds_compress.export.int8_product import Int8Product, blocks_worth_leaving_out
from ds_compress.export.serve import Int8Linear
from ds_compress.export.serve_weight_only import WeightOnlyLinear
from ds_compress.export.shape_only import ShapeOnly

_ACTIVATED = (
    ("dense", "intermediate_act_fn"),
    ("lin1", "activation"),
    ("c_fc", "act"),
    ("fc1", "activation_fn"),
    ("dense_h_to_4h", "act"),
    ("gate_proj", "act_fn"),
)
_SHARING = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
_OTHER_INPUTS = ("cross", "encdec", "encoder_attn")


def fuse(model: nn.Module) -> None:
    """In place, wherever layers of the model fit."""
    for name, module in list(model.named_modules()):
        for product, activation in _ACTIVATED:
            _fuse_activation(module, product, activation)
        if not any(word in name.lower() for word in _OTHER_INPUTS):
            for members in _SHARING:
                _fuse_linears(module, members)


def _fuse_activation(module: nn.Module, product: str, activation: str) -> None:
    linear = getattr(module, product, None)
    word = _word_for(getattr(module, activation, None))
    if isinstance(linear, (Int8Linear, WeightOnlyLinear)) and word and linear.activation == "none":
        linear.activation = word
        if activation in module._modules:
            module._modules[activation] = nn.Identity()
        else:
            setattr(module, activation, nn.Identity())


def _word_for(activation: Any) -> str:
    """What the kernels call it, "" when they do not know it."""
    if activation in (F.gelu, F.relu, F.silu):
        return {F.gelu: "gelu_erf", F.relu: "relu", F.silu: "silu"}[activation]
    if isinstance(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu_erf"
    names = {
        "GELUActivation": "gelu_erf",
        "NewGELUActivation": "gelu_tanh",
        "GELUTanh": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "ReLU": "relu",
        "SiLU": "silu",
        "SiLUActivation": "silu",
    }
    return names.get(type(activation).__name__, "")


class _FusedLinear:
    """Several Int8Linear with one input as one matrix product; holds the result until each has taken its part."""

    def __init__(self, members: list[Int8Linear]) -> None:
        first = members[0]
        self.parts = [member.out_features for member in members]
        biases = [torch.zeros(m.out_features) if m.bias is None else m.bias for m in members]
        self.bias = None if all(m.bias is None for m in members) else torch.cat(biases)
        self.scale = torch.cat([member.scale for member in members])
        self.input_scale, self.scale_divisor = first.input_scale, first.scale_divisor
        values = torch.cat([member.int_weight for member in members])
        self.product = Int8Product.of(values, blocks_worth_leaving_out(values))
        self._last: tuple[torch.Tensor, tuple[torch.Tensor, ...], list[bool]] | None = None

    def part(self, x: torch.Tensor, number: int) -> torch.Tensor:
        last = self._last
        if last is None or last[0] is not x or last[2][number]:
            y = self.product(x.contiguous(), self.scale, self.bias, self.input_scale, self.scale_divisor)
            self._last = last = (x, y.split(self.parts, dim=-1), [False] * len(self.parts))
        last[2][number] = True
        if all(last[2]):
            self._last = None
        return last[1][number]


class FusedPart(nn.Module):
    """One of the layers that a `_FusedLinear` computes."""

    def __init__(self, together: _FusedLinear, number: int, layer: Int8Linear) -> None:
        super().__init__()
        self._together, self._number = together, number
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias

    @property
    def weight(self) -> torch.Tensor:
        """Its shape and dtype, for models that look at them."""
        return ShapeOnly.of(self.out_features, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._together.part(input, self._number)


def _fuse_linears(module: nn.Module, names: tuple[str, ...]) -> None:
    members = [module._modules.get(name) for name in names]
    layers = [member for member in members if type(member) is Int8Linear]
    if len(layers) != len(names) or not _can_fuse(layers):
        return
    together = _FusedLinear(layers)
    for number, (name, layer) in enumerate(zip(names, layers, strict=True)):
        module._modules[name] = FusedPart(together, number, layer)


def _can_fuse(layers: list[Int8Linear]) -> bool:
    first = layers[0]

    def same_scale(layer: Int8Linear) -> bool:
        a, b = first.input_scale, layer.input_scale
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return all(
        layer.in_features == first.in_features
        and layer.scale_divisor == first.scale_divisor
        and layer.activation == "none"
        and same_scale(layer)
        for layer in layers
    )
