"""The loss of attention maps against its definition, pair by pair."""

from __future__ import annotations

import pytest
import torch

from ds_compress.config.schema.distillation import AttentionLoss
from ds_compress.distill.attention_scores import expose_scores
from ds_compress.distill.losses.attention import MapDistillation
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
