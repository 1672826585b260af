"""Imitated hidden states against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_compress.config.schema.distillation import HiddenLoss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.losses.hidden import HiddenDistillation


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_loss(kind: Any) -> None:
    own, theirs = [torch.randn(2, 3, 4) for _ in range(2)], [torch.randn(2, 3, 4) for _ in range(2)]
    mask = torch.tensor([[True, True, False], [True, True, True]])
    expected = []
    for a, b in zip(own, theirs, strict=True):
        a, b = a.double()[mask], b.double()[mask]
        cosine = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
        expected.append(((a - b) ** 2).mean() if kind == "mse" else (1 - cosine).mean())
    loss = HiddenDistillation(HiddenLoss(kind=kind))
    got = loss(CapturedActivations(hidden=own, token_mask=mask), CapturedActivations(hidden=theirs))
    assert float(got) == pytest.approx(float(sum(expected) / 2), rel=1e-5)
