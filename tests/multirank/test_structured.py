"""Structured pruning on every ZeRO stage: the same units, an equal finalized model, an unbroken loss after a shrink."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multirank import structured
from tests.multirank.launch import run_ranks

SCENARIO = "tests.multirank.structured:"


STAGES = {1: (0,), 2: structured.STAGES}


@pytest.fixture(scope="module")
def masked() -> dict[int, Any]:
    names = tuple(structured.BLOCKS)
    return {
        size: run_ranks(size, SCENARIO + "masked_and_final", names=names, stages=stages)[0]
        for size, stages in STAGES.items()
    }


def runs(masked: dict[int, Any], name: str) -> list[dict[str, Any]]:
    return [masked[size][name, stage] for size, stages in STAGES.items() for stage in stages]


@pytest.mark.parametrize("name", structured.BLOCKS)
class TestMasks:
    def test_the_same_units_on_every_stage_and_world_size(self, masked: dict[int, Any], name: str) -> None:
        expected = masked[1][name, 0]["kept"]
        assert [run["kept"] for run in runs(masked, name)] == [expected] * 5

    def test_units_are_half_of_all(self, masked: dict[int, Any], name: str) -> None:
        kept = masked[2][name, 3]["kept"]
        full = {"attention": 4, ".layer.": 96, "encoder.layer": 4}
        units = sum(next(size for part, size in full.items() if part in group) for group in kept)
        assert sum(map(len, kept.values())) == units // 2

    def test_finalized_equals_masked(self, masked: dict[int, Any], name: str) -> None:
        for result in runs(masked, name):
            torch.testing.assert_close(result["final"], result["masked"], rtol=1e-5, atol=1e-5)
            assert result["plain"] and result["parameters"] < 48_866

    def test_losses_agree(self, masked: dict[int, Any], name: str) -> None:
        reference = torch.tensor(masked[1][name, 0]["losses"])
        for result in runs(masked, name):
            torch.testing.assert_close(torch.tensor(result["losses"]), reference, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def shrunk() -> dict[Any, Any]:
    return run_ranks(2, SCENARIO + "shrunk_and_masked", cases=CASES)[0]


# Everything that can be combined, on the wrappers that differ most; the structures alone on all of them.
CASES = [
    *(("rows+heads+depth", wrapper) for wrapper in structured.WRAPPERS),
    *(("rows+sparse+w8a8", wrapper) for wrapper in ("fp32-0", "fp32-2", "bf16-3-sub-groups")),
]


@pytest.mark.parametrize(("name", "wrapper"), CASES)
class TestShrink:
    def test_training_goes_on_as_if_nothing_had_happened(
        self, shrunk: dict[Any, Any], name: str, wrapper: str
    ) -> None:
        small, full = shrunk[name, wrapper, True], shrunk[name, wrapper, False]
        tolerance = 2e-4 if structured.WRAPPERS[wrapper].dtype == "fp32" else 2e-2
        torch.testing.assert_close(
            torch.tensor(small["losses"]), torch.tensor(full["losses"]), rtol=tolerance, atol=tolerance
        )

    def test_the_model_is_smaller_and_the_run_the_same(
        self, shrunk: dict[Any, Any], name: str, wrapper: str
    ) -> None:
        small, full = shrunk[name, wrapper, True], shrunk[name, wrapper, False]
        assert small["parameters"] < 0.8 * full["parameters"]
        assert small["same_state"]
        assert [small[k] for k in ("applied", "steps", "lr")] == [full[k] for k in ("applied", "steps", "lr")]


def test_resume_of_a_shrunk_run_in_sub_groups() -> None:
    """Other wrappers: test_resume."""
    result = run_ranks(2, SCENARIO + "resumed_after_shrink", wrapper="bf16-3-sub-groups")[0]
    assert result["resumed"] == result["unbroken"]
