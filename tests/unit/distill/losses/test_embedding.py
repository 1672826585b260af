"""Imitated inputs of the first layer against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_compress.config.schema.distillation import EmbeddingLoss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.losses.embedding import EmbeddingDistillation


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_embedding_loss(kind: Any) -> None:
    own, theirs = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    a, b = own.double()[mask], theirs.double()[mask]
    cosine = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
    expected = ((a - b) ** 2).mean() if kind == "mse" else (1 - cosine).mean()
    got = EmbeddingDistillation(EmbeddingLoss(kind=kind))(
        CapturedActivations(embedding=own, token_mask=mask), CapturedActivations(embedding=theirs)
    )
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_padding_does_not_count() -> None:
    own, theirs = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    changed = own.clone()
    changed[:, 2] += 100.0
    mask = torch.tensor([[True, True, False]])
    loss = EmbeddingDistillation(EmbeddingLoss())
    first, second = (
        loss(CapturedActivations(embedding=x, token_mask=mask), CapturedActivations(embedding=theirs))
        for x in (own, changed)
    )
    torch.testing.assert_close(first, second)
