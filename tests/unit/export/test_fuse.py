"""Layers that share an input become one product only where that computes what each of them did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_compress.export.fuse import FusedPart, fuse
from ds_compress.export.serve import Int8Linear


class Attention(nn.Module):
    """q, k and v of one input, as the models name them."""

    def __init__(self, layers: list[Int8Linear]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = layers

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


def layer(seed: int, outputs: int = 8, inputs: int = 16, bias: bool = True, **changed: Any) -> Int8Linear:
    generator = torch.Generator().manual_seed(seed)
    made = object.__new__(Int8Linear)
    nn.Module.__init__(made)
    made.out_features, made.in_features = outputs, inputs
    made.int_weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    made.scale = torch.rand(outputs, generator=generator) / 100
    made.bias = torch.randn(outputs, generator=generator) if bias else None
    made.scale_divisor, made.activation, made.input_scale = 127, "none", None
    made._product, made._blocks = None, None
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def fused(*layers: Int8Linear) -> Attention:
    model = nn.Sequential(Attention(list(layers)))
    fuse(model)
    return model[0]  # type: ignore[return-value]


def is_fused(attention: Attention) -> bool:
    return isinstance(attention.q_proj, FusedPart)


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_gives_what_three_did(bias: bool) -> None:
    x = torch.randn(3, 5, 16)
    expected = Attention([layer(0), layer(1, outputs=4, bias=bias), layer(2, bias=bias)])(x)
    together = fused(layer(0), layer(1, outputs=4, bias=bias), layer(2, bias=bias))
    assert is_fused(together)
    for _ in range(2):
        for ours, theirs in zip(together(x), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "changed",
    [
        {"input_scale": torch.tensor([0.02])},
        {"scale_divisor": 128},
        {"activation": "relu"},
    ],
)
def test_layers_that_quantize_their_input_otherwise_stay_apart(changed: dict[str, Any]) -> None:
    attention = fused(layer(0), layer(1, **changed), layer(2))
    assert not is_fused(attention)
    x = torch.randn(2, 16)
    assert torch.equal(attention(x)[1], layer(1, **changed)(x))


def test_static_ranges_are_compared_by_value() -> None:
    same = [torch.tensor([0.02]) for _ in range(3)]
    assert is_fused(fused(*(layer(i, input_scale=scale) for i, scale in enumerate(same))))
    other = [*same[:2], torch.tensor([0.03])]
    assert not is_fused(fused(*(layer(i, input_scale=scale) for i, scale in enumerate(other))))


def test_a_result_is_not_kept_for_another_input() -> None:
    together, alone = fused(layer(0), layer(1), layer(2)), layer(0)
    first, second = torch.randn(2, 16), torch.randn(2, 16)
    for x in (first, second, first):
        assert torch.equal(together.q_proj(x), alone(x))
