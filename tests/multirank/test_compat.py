"""Every JSON of the old documentation trains 20 steps on two ranks: through `compat` exactly as without it.

Defects 2, 4 and 5 of the removed library (see `tests/unit/compat/test_defects.py`) show with two ranks only here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multirank.compat import NAMES, STAGES
from tests.multirank.launch import run_ranks


@pytest.fixture(scope="module")
def runs() -> Any:
    return run_ranks(2, "tests.multirank.compat:legacy_jsons")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_04_compat_and_the_new_path_agree_on_every_stage(runs: Any, name: str, stage: int) -> None:
    """Old: nothing ever ran sharded."""
    for rank in (0, 1):
        run = runs[rank]["jsons"][name, stage]
        new, old = run["losses"]
        assert new == old and len(new) == 20
        assert run["masks"] and run["weights"]
        assert run["metrics"][0] == run["metrics"][1]
    reference = runs[0]["jsons"][name, 0]
    torch.testing.assert_close(new, runs[1]["jsons"][name, 0]["losses"][0], rtol=2e-3, atol=2e-3)
    assert run["metrics"][0] == pytest.approx(reference["metrics"][0], abs=1e-6)
    if "pruning" in name or name == "everything":
        assert run["zeros"] > 1000 or name == "channel_pruning"


def test_04_every_technique_did_something(runs: Any) -> None:
    """Each JSON changed its run: no two techniques have the same losses, none those of another."""
    lasts = {name: runs[0]["jsons"][name, 0]["losses"][0][-1] for name in NAMES}
    assert len(set(lasts.values())) == len(NAMES)


@pytest.mark.parametrize("stage", STAGES)
def test_05_static_ranges_are_those_of_all_ranks(runs: Any, stage: int) -> None:
    """Old: each rank had the range of its own data."""
    ranges = [runs[rank]["jsons"]["activation_quantization_static", stage]["ranges"] for rank in (0, 1)]
    assert len(ranges[0]) == 10 and ranges[0] == ranges[1]


@pytest.mark.parametrize("name", ["activation_quantization_static", "sparse_pruning_topk"])
def test_a_loop_in_ddp_is_one_run_in_all_processes_and_that_of_an_engine(runs: Any, name: str) -> None:
    one, other = (runs[rank]["loops"][name] for rank in (0, 1))
    assert all(torch.equal(weight, other["weights"][key]) for key, weight in one["weights"].items())
    if "static" in name:
        ranges = [run["state"]["activation_quantization"]["ranges"] for run in (one, other)]
        assert len(ranges[0]) == 10
        assert all(torch.equal(value, ranges[1][key]) for key, value in ranges[0].items())
    for rank in (0, 1):
        expected = runs[rank]["jsons"][name, 0]["losses"][0]
        torch.testing.assert_close(runs[rank]["loops"][name]["losses"], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_02_cleaning_a_sharded_engine(runs: Any, stage: int) -> None:
    """Old: redundancy_clean indexed partitioned weights of shape [0]."""
    for rank in (0, 1):
        cleaned = runs[rank]["cleaned"][stage]
        torch.testing.assert_close(cleaned["got"], cleaned["expected"], rtol=1e-5, atol=1e-6)
        assert cleaned["rows"] == 48


def test_05_student_initialization_gathers(runs: Any) -> None:
    """Old: it copied the empty local parts of partitioned weights."""
    assert runs[0]["student"] and runs[1]["student"]
