"""The losses of attention maps and of relations against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from ds_compress.config.schema.distillation import AttentionLoss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.attention_scores import expose_scores
from ds_compress.distill.losses.attention import MapDistillation, RelationDistillation
from ds_compress.distill.losses.base import ModelPair
from tests.unit.distill.oracle import kl
from tests.unit.distill.test_attention_scores import llama, recorded, tokens


def test_map_loss_is_the_mean_square_over_pairs_that_may_attend() -> None:
    model, teacher = llama(), llama()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        expose_scores(teacher)
        theirs = recorded(teacher)
    expose_scores(model)
    own = recorded(model)
    own.token_mask = tokens()["attention_mask"].bool()
    squares = []
    for a, b in zip(own.maps, theirs.maps, strict=True):
        errors = (a.scores().double() - b.scores().double()) ** 2
        of_layer = [
            errors[row, :, i, j].mean()
            for row, length in enumerate((7, 5))
            for i in range(length)
            for j in range(i + 1)
        ]
        squares.append(torch.stack(of_layer).mean())
    got = MapDistillation(AttentionLoss(kind="maps"))(own, theirs)
    assert float(got) == pytest.approx(float(torch.stack(squares).mean()), rel=1e-4)
    got.backward()
    attention = model.layers[1].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        assert projection.weight.grad is not None and projection.weight.grad.any()
    assert attention.v_proj.weight.grad is None or not attention.v_proj.weight.grad.any()
    assert model.layers[0].self_attn.v_proj.weight.grad.any()


def test_attention_loss_compares_relations_of_any_width() -> None:
    own = [tuple(torch.randn(1, 4, 6) for _ in range(3))]
    theirs = [tuple(torch.randn(1, 4, 10) for _ in range(3))]

    def relation(x: torch.Tensor, heads: int) -> torch.Tensor:
        split = x.double().view(1, 4, heads, -1).transpose(1, 2)
        return (split @ split.transpose(2, 3) / math.sqrt(split.shape[-1])).softmax(-1)

    expected = (
        sum(kl(relation(b, 2), relation(a, 2)).mean() for a, b in zip(own[0], theirs[0], strict=True)) / 3
    )
    got = RelationDistillation(AttentionLoss(), ModelPair(heads=2))(
        CapturedActivations(relations=own), CapturedActivations(relations=theirs)
    )
    assert float(got) == pytest.approx(float(expected), rel=1e-4)


def test_attention_to_padding_does_not_count() -> None:
    mask = torch.tensor([[True, True, False]])
    own, theirs = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    changed = own.clone()
    changed[:, 2] += 100.0
    loss = RelationDistillation(AttentionLoss(), ModelPair(heads=2))
    a, b = (
        loss(
            CapturedActivations(relations=[(x,) * 3], token_mask=mask),
            CapturedActivations(relations=[(theirs,) * 3]),
        )
        for x in (own, changed)
    )
    torch.testing.assert_close(a, b)
