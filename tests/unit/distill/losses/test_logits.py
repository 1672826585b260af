"""Imitated logits against Hinton's formula."""

from __future__ import annotations

import pytest
import torch

from ds_compress.config.schema.distillation import LogitsLoss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.losses.logits import LogitsDistillation
from tests.unit.distill.oracle import kl


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_loss_is_hintons(temperature: float) -> None:
    own, theirs = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    expected = kl((theirs / temperature).softmax(-1), (own / temperature).softmax(-1)).mean() * temperature**2
    got = LogitsDistillation(LogitsLoss(temperature=temperature))(
        CapturedActivations(logits=own), CapturedActivations(logits=theirs)
    )
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_logits_of_padding_do_not_count_and_padded_vocabularies_are_cut() -> None:
    own, theirs = torch.randn(2, 3, 5), torch.randn(2, 3, 8)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    got = LogitsDistillation(LogitsLoss())(
        CapturedActivations(logits=own, token_mask=mask), CapturedActivations(logits=theirs)
    )
    rows = kl(theirs[..., :5].double().softmax(-1), own.double().softmax(-1))[mask]
    assert float(got) == pytest.approx(float(rows.mean()), rel=1e-5)
