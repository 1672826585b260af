"""Gradients that travel quantized or under a robust rule, at every ZeRO stage, beside those of stock DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.multirank.launch import run_ranks
from tests.multirank.reduction import LAYOUTS

Results = list[dict[str, Any]]

QUANTIZED, EXACT = 37 * 128 + 2 * 37 * 53, 37 * 2 + 53 + 37 + 1 + 2
"""Elements of `reduction.Odd`: of its matrices, and of what is small or has one dimension."""

# The largest error over the largest element: one or two roundings to 127 or 7 steps of gradients that are larger
# before they are averaged. "mean" sums in fp32 where DeepSpeed sums in the dtype of the gradients.
LARGEST = {"int8": 0.02, "feedback": 0.02, "int4": 0.3, "mean": 0.01}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    return run_ranks(2, "tests.multirank.reduction_runs:run_two", folder=folder)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    return run_ranks(4, "tests.multirank.reduction_runs:run_four", folder=folder)


def check_gradients(ranks: Results, name: str) -> None:
    for kind, found in ranks[0]["gradients"][name].items():
        assert found["largest"] < LARGEST[kind], kind
        if kind != "mean":
            assert found["metrics"]["gradient_reduction/quantized_elements"] >= QUANTIZED
            assert found["metrics"]["gradient_reduction/exact_elements"] >= EXACT
            assert found["largest"] > 1e-5, f"{kind}: nothing was quantized"
        for rank in ranks:
            assert rank["gradients"][name][kind]["weights"] == found["weights"], "the same bits everywhere"


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_gradients_are_those_of_stock_deepspeed_within_the_scales(two: Results, name: str) -> None:
    check_gradients(two, name)


@pytest.mark.parametrize("name", ["0 fp32", "2 small buckets", "3 small buckets"])
def test_gradients_in_four_processes(four: Results, name: str) -> None:
    check_gradients(four, name)


def test_error_feedback_costs_about_a_byte_per_element(two: Results) -> None:
    for name in ("2 fp32", "3 bf16"):
        kept = two[0]["gradients"][name]["feedback"]["residual_bytes"]
        assert QUANTIZED < kept < 1.3 * QUANTIZED


def test_error_feedback_helps_when_gradients_accumulate(two: Results) -> None:
    found = two[0]["gradients"]["3 bf16"]
    for name in ("embed.weight", "first.weight", "second.weight"):
        assert found["feedback"]["error"][name] < found["int8"]["error"][name]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_muon_trains_as_in_stock_deepspeed(two: Results, stage: int) -> None:
    exact, quantized = two[0]["muon"][stage]
    assert exact < 1e-6
    assert 0 < quantized < 0.01


def test_masks_stay_exact(two: Results) -> None:
    for kept, numel in two[0]["masks"].values():
        assert kept == -(-numel * 4 // 10)


def test_warmup_small_buckets_and_fast_links_are_left_to_deepspeed(two: Results) -> None:
    special = two[0]["special"]
    assert special["warmup"] == [0, 0, QUANTIZED]
    assert special["small"]["gradient_reduction/quantized_elements"] == 0
    assert special["slow"][0] == QUANTIZED and "gradient_compression is on" in special["slow"][1]
    assert special["fast"][0] == 0 and "off on this link" in special["fast"][1]
    quantized, said = special["really"]
    assert ("is on" if quantized else "is off") in said and "Mbit/s" in said
    assert all(rank["special"]["really"][0] == quantized for rank in two), "all processes decide alike"


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_loss_scale_goes_the_way_of_stock(two: Results, stage: int) -> None:
    found = two[0]["loss scales"]
    stock, skipped = found[f"{stage} stock"]
    assert skipped >= 3 and len(set(stock)) >= 3, "there were overflows, and a recovery"
    assert found[f"{stage} int8"] == (stock, skipped)
    assert found[f"{stage} feedback"] == (stock, skipped)
    assert found[f"{stage} nan_to_num"][0] != stock, "the control: a reduction that hides NaN is noticed"
    finite, empty_after_a_skip, empty_at_the_end = found[f"{stage} residuals"]
    assert finite and empty_after_a_skip and not empty_at_the_end


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_error_feedback_is_in_the_checkpoint(two: Results, stage: int) -> None:
    resumed, without = two[0]["checkpoints"][stage]
    assert resumed
    assert not without, "the control: residuals that are lost are noticed"


class TestHosts:
    """`hierarchical`."""

    @pytest.mark.parametrize("stage", [0, 2, 3])
    def test_sums_inside_a_host_are_quantized_once_they_leave_it(self, four: Results, stage: int) -> None:
        case = four[0]["hosts"][f"two hosts, {stage}"]
        assert 1e-5 < case["largest"] < LARGEST["int8"]
        assert case["quantized"] == QUANTIZED
        assert all(rank["hosts"][f"two hosts, {stage}"]["weights"] == case["weights"] for rank in four)

    def test_one_host_has_nothing_to_quantize(self, four: Results) -> None:
        assert four[0]["hosts"]["one host"] == 0

    def test_hosts_of_unequal_size_are_refused_everywhere(self, four: Results) -> None:
        for rank in four:
            assert "3 on host0, 1 on host1" in rank["hosts"]["uneven"]


class TestWeightsOnTheWire:
    """`parameter_compression`."""

    @pytest.fixture(params=["1 bf16", "1 bf16, fp32 accumulation", "2 fp32", "3 bf16"])
    def name(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_training_goes_as_it_would_have(self, two: Results, name: str) -> None:
        case = two[0]["weights"][name]
        assert case["to stock"] < 0.01
        assert case["metrics"]["parameter_compression/quantized_elements"] > 4 * QUANTIZED
        assert all(rank["weights"][name]["copies"] == case["copies"] for rank in two)

    def test_copies_are_exact_after_a_refresh_and_close_before(self, two: Results, name: str) -> None:
        case = two[0]["weights"][name]
        assert case["refreshed"]
        assert case["saved as stepped"]
        assert case["to exact"] <= (2**-7 if "bf16" in name else 1e-4), "a unit of bfloat16 between 1 and 2"

    def test_a_new_mask_is_exact_at_once_and_stays(self, two: Results, name: str) -> None:
        zeros = two[0]["weights"][name]["zeros"]
        assert zeros == [0, 0, *[37 * 53 - -(-37 * 53 * 4 // 10)] * 4]

    def test_checkpoints_resume_and_detaching_gives_everything_back(self, two: Results, name: str) -> None:
        assert two[0]["weights"][name]["resumed"]
        assert two[0]["weights"][name]["detached"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_worker_is_named_and_does_not_get_through(four: Results, stage: int) -> None:
    found = four[0]["robust"]
    clean = found[f"{stage} none"]
    assert clean["named"] == {} and clean["steps"] == 2
    for attack in ("large", "nan") if stage != 1 else ("large",):
        case = found[f"{stage} {attack}"]
        assert case["named"] == {3: 2}, attack
        assert case["norm"] < 1.5 * clean["norm"]
        assert case["skipped"] == 0
        assert all(rank["robust"][f"{stage} {attack}"]["weights"] == case["weights"] for rank in four)
    norms = found[f"{stage} large"]["norms"]
    assert norms[3] > 30 * max(norms[:3])


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_worker_momentum_is_the_running_mean_and_is_in_checkpoints(two: Results, stage: int) -> None:
    found = two[0]["momenta"][stage]
    assert found["error"] < 0.01, "what is kept is bfloat16"
    assert found["accumulated"] < 0.01, "beta is per step, however many gradients make one"
    assert found["to stock"] > 0.1
    assert found["resumed"]


def test_abort_names_the_worker_in_every_process(four: Results) -> None:
    for rank in four:
        assert rank["robust"]["abort"].startswith("step 0: worker 3: gradient norm ")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_who_keeps_standing_out_is_excluded_from_the_next_step_on(four: Results, stage: int) -> None:
    """Ten times is too little to tell in one bucket; that it was there before, a checkpoint remembers."""
    first, *later = four[0]["robust"]["exclude"][stage]
    assert len(later) == 3
    assert all(norm < 0.6 * first for norm in later)


def test_more_bad_workers_than_can_be_outvoted_are_refused(four: Results) -> None:
    assert "max_malicious" in four[0]["robust"]["too many"]
    assert "at most 1 with 4 data-parallel processes" in four[0]["robust"]["too many"]
