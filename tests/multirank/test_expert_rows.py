"""Rows inside experts on every ZeRO stage: the same units, removed equals masked, an unbroken loss after a shrink."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multirank import expert_rows
from tests.multirank.launch import run_ranks

SCENARIO = "tests.multirank.expert_rows:"
NAMES = (*expert_rows.CASES, "mixtral")
SHRINKING = ("mixtral-l1", "gpt_oss-taylor")


@pytest.fixture(scope="module")
def removed() -> dict[int, Any]:
    return {
        size: run_ranks(size, SCENARIO + "removed", names=NAMES, stages=stages)[0]
        for size, stages in {1: (0,), 2: expert_rows.STAGES}.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_removed_equals_masked_and_every_stage_agrees(removed: dict[int, Any], name: str) -> None:
    alone = removed[1][name, 0]
    full = sum(p.numel() for p in expert_rows.mixture(name.split("-")[0]).parameters())
    for result in (removed[2][name, stage] for stage in expert_rows.STAGES):
        assert result["kept"] == alone["kept"]
        torch.testing.assert_close(result["losses"], alone["losses"], rtol=1e-4, atol=1e-5)
        largest = float(result["masked"].abs().max())
        torch.testing.assert_close(result["final"], result["masked"], rtol=0, atol=1e-5 * max(1.0, largest))
        assert result["parameters"] < 0.95 * full
        # Under a global scope layers differ, which no config can say.
        assert bool(result["obstacles"]) <= ("global" in name)


@pytest.fixture(scope="module")
def shrunk() -> dict[Any, Any]:
    return run_ranks(2, SCENARIO + "shrunk", names=SHRINKING)[0]


@pytest.mark.parametrize("stage", expert_rows.STAGES)
@pytest.mark.parametrize("name", SHRINKING)
def test_training_goes_on_after_a_shrink(shrunk: dict[Any, Any], name: str, stage: int) -> None:
    small, full = shrunk[name, stage, True], shrunk[name, stage, False]
    assert small["parameters"] < 0.8 * full["parameters"]
    torch.testing.assert_close(small["losses"], full["losses"], rtol=2e-4, atol=2e-4)
