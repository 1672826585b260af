"""The noise of a random choice is bit for bit that of a CPU: it is made of exactly rounded operations."""

from __future__ import annotations

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from ds_compress.select.gumbel import PRUNED, GumbelNoise

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]


def test_noisy_scores_are_those_of_the_cpu() -> None:
    device = get_accelerator().current_device_name()
    noise = GumbelNoise("sparse_pruning", 0.7, seed=3)
    scores = torch.rand(1_000_003, generator=torch.Generator().manual_seed(0)) ** 8
    scores[::1000], scores[1::1000] = 0.0, PRUNED
    assert torch.equal(
        noise.perturbed(scores.to(device), "w", 12_345).cpu(), noise.perturbed(scores, "w", 12_345)
    )
