"""The calibration set is shared by processes, and the table is the one of a single process, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.multirank.launch import run_ranks
from tests.multirank.sensitivity import tables


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, "tests.multirank.sensitivity:run_all", timeout_s=120, backend="gloo")


def test_two_processes_measure_what_one_does(ranks: list[dict[str, Any]]) -> None:
    alone = tables()
    assert [result["tables"] for result in ranks] == [alone, alone]
    assert any(group["increase"]["int3_g16"] > 0 for group in alone[0]["groups"].values())


def test_no_process_waits_for_one_that_failed(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert "process 1: the model's own outputs are not finite" in result["failure"]
