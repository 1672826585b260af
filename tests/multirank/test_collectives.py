"""The collectives of `ds_compress.reduce` against fp64, over gloo, in 2 and in 4 processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.multirank.launch import run_ranks

Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Results:
    """What each process saw."""
    return run_ranks(request.param, "tests.multirank.collectives:run_all", timeout_s=120)


def same_everywhere(ranks: Results, of: Callable[[dict[str, Any]], Any]) -> bool:
    return all(of(result) == of(ranks[0]) for result in ranks)


def test_all_reduce_stays_within_the_scales_of_both_quantizations(ranks: Results) -> None:
    assert len(ranks[0]["all_reduce"]) > 25
    for case in ranks[0]["all_reduce"]:
        assert case["error"] <= 1, case["numel"]


def test_all_reduce_ends_with_identical_bits(ranks: Results) -> None:
    assert same_everywhere(ranks, lambda r: [case["bits"] for case in r["all_reduce"]])


def test_reduce_scatter_gives_each_owner_its_slices_and_nothing_else(ranks: Results) -> None:
    for result in ranks:
        for case in result["scatter"]:
            assert case["missing"] == 0, case
            assert case["error"] <= 0.51, case


def test_special_values(ranks: Results) -> None:
    world = len(ranks)
    for result in ranks:
        specials = result["specials"]
        assert specials["nan"][0] == specials["inf"][0] == 512, "a block becomes NaN, and no other"
        assert specials["nan"][2] == 0
        assert specials["zero"] == (0, 0.0, 0.0)
        assert abs(specials["huge"][1] / (3e38 / world) - 1) < 0.01
        assert 0 <= specials["tiny"][1] <= 1.01e-38 / world
    assert same_everywhere(ranks, lambda r: r["specials"]["huge"])


def test_error_feedback_averages_out_what_messages_lose(ranks: Results) -> None:
    found = ranks[0]["feedback"]
    assert found["8"] < 0.25 * found["none"]
    assert found["16"] < 0.25 * found["none"]


def test_a_skipped_step_leaves_no_trace_in_the_residuals(ranks: Results) -> None:
    for result in ranks:
        found = result["feedback"]
        assert found["step 0"] == found["replayed 0"]
        assert found["step 1"] == found["step 2"] == found["replayed 1"]
        assert found["step 0"] != found["step 1"], "the residual of the first step is in the second"


@pytest.mark.parametrize("bits", ["8", "4"])
def test_copies_of_weights_stay_equal_follow_and_become_exact(ranks: Results, bits: str) -> None:
    assert same_everywhere(ranks, lambda r: r["weights"][bits]["bits"])
    for result in ranks:
        found = result["weights"][bits]
        assert found["new_zeros"]
        assert found["not zero"] == 0
        assert found["refreshed"]
        assert max(found["errors"]) < 2**-8 * 4, "half a unit of bfloat16, and the codes"
        assert found["errors"][-1] < 2 * found["errors"][0], "errors do not add up"


def test_robust_rules_over_the_wire_are_the_rules(ranks: Results) -> None:
    if len(ranks) < 3:
        pytest.skip("one bad worker of two cannot be told from the other")
    for case in ranks[0]["robust"][:-1]:
        assert case["error"] < (1e-5 if case["plain"] else 0.02), case
        assert case["accused"] == (() if case["bad"] == "none" else (1,)), case
    assert same_everywhere(ranks, lambda r: [case["bits"] for case in r["robust"][:-1]])


def test_an_overflow_of_all_workers_is_no_attack(ranks: Results) -> None:
    assert all(result["robust"][-1]["all_nan"] for result in ranks)


def test_the_link_decides_alike_everywhere(ranks: Results) -> None:
    for result in ranks:
        assert result["link"] == {"slow link": True, "fast link": False}
