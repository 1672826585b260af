"""Mixtures of experts give one answer on every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multirank.launch import run_ranks
from tests.multirank.mixtures import SPARSE, STAGES, TEACHERS

SCOPES_ON = ("qwen3_moe", "gpt_oss")


@pytest.fixture(scope="module")
def sparse() -> dict[tuple[str, str, int], dict[str, Any]]:
    return run_ranks(2, "tests.multirank.mixtures:sparse", names=SCOPES_ON, kinds=list(SPARSE))[0]


def _same_at_every_stage(results: Any, name: str, kind: str) -> None:
    reference = results[name, kind, 0]
    for stage in STAGES[1:]:
        got = results[name, kind, stage]
        for weight, values in reference["weights"].items():
            assert torch.equal(values != 0, got["weights"][weight] != 0), f"{weight} at stage {stage}"
        torch.testing.assert_close(got["losses"], reference["losses"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("name", SCOPES_ON)
def test_masks_of_every_kind(sparse: Any, name: str, kind: str) -> None:
    _same_at_every_stage(sparse, name, kind)
    for weight, values in sparse[name, kind, 3]["weights"].items():
        if (
            "layers.1." in weight
            and ("gate_up_proj" in weight or "down_proj" in weight)
            and values.dim() == 3
        ):
            kept = (values != 0).flatten(1).sum(1)
            assert bool((kept == -(-values[0].numel() // 2)).all()), weight


@pytest.fixture(scope="module")
def distilled() -> dict[tuple[str, int], dict[str, Any]]:
    return run_ranks(2, "tests.multirank.mixtures:distilled")[0]


@pytest.mark.parametrize("pair", TEACHERS)
def test_a_mixture_teaches_alike_at_every_stage(distilled: Any, pair: str) -> None:
    reference = distilled[pair, 0]["losses"]
    assert min(reference[1:]) > 0
    for stage in STAGES[1:]:
        torch.testing.assert_close(distilled[pair, stage]["losses"], reference, rtol=1e-4, atol=1e-5)


def test_experts_without_tokens_are_no_fault() -> None:
    """Each process sees other data, whose gradients are summed in another order at each stage: no bitwise answer."""
    for stage, weights in run_ranks(2, "tests.multirank.mixtures:experts_without_tokens")[0].items():
        for name, values in weights.items():
            assert bool(torch.isfinite(values).all()), f"{name} at stage {stage}"
            if "layers.1.mlp.experts" in name:
                kept = (values != 0).flatten(1).sum(1)
                assert bool((kept == values[0].numel() // 2).all()), f"{name} at stage {stage}"
