"""Experts go on every ZeRO stage alike: the same ones, the logits of a model without them, and an unbroken training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multirank import experts
from tests.multirank.launch import run_ranks

SCENARIO = "tests.multirank.experts:"
ZOO = ("mixtral", "deepseek_v3", "gpt_oss", "llama4", "ernie_moe", "stranger", "selective")
"""All architectures: see `test_mixture_grid`."""


@pytest.fixture(scope="module")
def zoo() -> list[dict[Any, Any]]:
    return run_ranks(2, SCENARIO + "removed", names=ZOO)


@pytest.mark.parametrize("name", ZOO)
class TestZoo:
    def test_the_same_experts_in_every_process_on_every_stage(self, zoo: Any, name: str) -> None:
        kept = [rank[name, stage]["kept"] for rank in zoo for stage in experts.STAGES]
        assert kept == [kept[0]] * 6

    def test_half_of_them(self, zoo: Any, name: str) -> None:
        for units in zoo[0][name, 3]["kept"].values():
            assert len(units) in (2, 4)
            if len(units) == 4:  # of each of the two groups of the router as many
                assert sum(unit < 4 for unit in units) == 2

    def test_removed_equals_masked(self, zoo: Any, name: str) -> None:
        for stage in experts.STAGES:
            result = zoo[0][name, stage]
            torch.testing.assert_close(result["final"], result["masked"], rtol=1e-5, atol=1e-5)

    def test_losses_agree(self, zoo: Any, name: str) -> None:
        for stage in experts.STAGES:
            assert zoo[0][name, stage]["losses"] == pytest.approx(zoo[0][name, 0]["losses"], rel=1e-4)


METHODS = ("reap", "frequency", "l2", "taylor", "random")


@pytest.fixture(scope="module")
def other_data() -> dict[str, list[dict[Any, Any]]]:
    """By method: each process trains on other tokens."""
    return {
        method: run_ranks(
            2, SCENARIO + "removed", names=("deepseek_v3", "selective"), alike=False, method=method
        )
        for method in METHODS
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["deepseek_v3", "selective"])
def test_processes_with_other_tokens_agree(other_data: Any, name: str, method: str) -> None:
    runs = [rank[name, stage] for rank in other_data[method] for stage in experts.STAGES]
    assert [run["kept"] for run in runs] == [runs[0]["kept"]] * 6
    for run in runs[:3]:
        assert run["losses"] == pytest.approx(runs[0]["losses"], rel=1e-4)
    assert runs[0]["losses"] != runs[3]["losses"]


SHRUNK = [
    ("mixtral", "fp32-0"),
    ("deepseek_v3", "fp32-2"),
    ("deepseek_v3", "fp32-3"),
    ("ernie_moe", "fp32-3"),
    ("llama4", "fp32-2"),
    ("selective", "fp32-2"),
    ("selective", "fp32-3"),
    ("gpt_oss", "bf16-2-offload-groups"),
    ("granite_moe", "bf16-3-sub-groups"),
]


@pytest.fixture(scope="module", params=[False, True], ids=["cut", "merged"])
def shrunk(request: pytest.FixtureRequest) -> dict[Any, Any]:
    shared: dict[str, Any] = {"merge": True, "schedule_offset_end": 4} if request.param else {}
    return run_ranks(2, SCENARIO + "shrunk_and_masked", cases=SHRUNK, **shared)[0]


@pytest.mark.parametrize(("name", "wrapper"), SHRUNK)
def test_training_goes_on_as_if_only_masked(shrunk: dict[Any, Any], name: str, wrapper: str) -> None:
    smaller, masked = shrunk[name, wrapper, True], shrunk[name, wrapper, False]
    assert smaller["parameters"] < 0.9 * masked["parameters"]
    tolerance = 1e-5 if wrapper.startswith("fp32") else 1e-2
    assert smaller["losses"] == pytest.approx(masked["losses"], rel=tolerance)
    torch.testing.assert_close(smaller["logits"], masked["logits"], rtol=tolerance, atol=tolerance)


RESUMED = [
    ("deepseek_v3", 0, True),
    ("deepseek_v3", 2, False),
    ("deepseek_v3", 3, True),
    ("ernie_moe", 3, True),
    ("selective", 3, True),
]


@pytest.fixture(scope="module", params=[3, 6], ids=["in mid-schedule", "after the cut"])
def resumed(request: pytest.FixtureRequest) -> dict[Any, Any]:
    schedule: dict[str, Any] = {"schedule_offset_end": 6, "schedule_offset_stride": 2, "merge": True}
    return run_ranks(2, SCENARIO + "resumed", cases=RESUMED, saved_at=request.param, **schedule)[0]


@pytest.mark.parametrize(("name", "stage", "shrinks"), RESUMED)
def test_resuming_changes_nothing(resumed: dict[Any, Any], name: str, stage: int, shrinks: bool) -> None:
    result = resumed[name, stage, shrinks]
    assert result["resumed"] == pytest.approx(result["unbroken"], rel=1e-5)
    assert result["metrics"][1] == pytest.approx(result["metrics"][0])
    assert result["metrics"][1]["expert_pruning/density"] == 0.5
