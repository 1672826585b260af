"""What a process among thousands sends and holds for us: simulated, and bounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multirank.launch import run_ranks
from tests.multirank.thousands import AT_A_TIME, BUCKET, LAYERS_AT_A_TIME, WORLD_SIZES, contribution, numbered


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return dict(run_ranks(1, "tests.multirank.thousands:run", backend="gloo")[0])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_robust_reduction_sends_two_matrices_of_inner_products(
    found: dict[str, Any], world_size: int
) -> None:
    cost = found["robust"]["costs"][world_size]
    products = 8 * world_size**2
    assert cost.sent <= 2 * products + 2.1 * 4 * BUCKET
    assert cost.peak <= 6 * products + 12 * 4 * BUCKET
    assert cost.collectives == 4


def test_robust_reduction_of_64_workers_decides_alike_by_the_products_of_all(found: dict[str, Any]) -> None:
    threads = found["robust"]["threads"]
    first, products = threads[0]
    assert all(torch.equal(x, first) and torch.equal(gram, products) for x, gram in threads)
    rows = torch.stack([contribution(rank) for rank in range(64)]).double()
    torch.testing.assert_close(products, rows @ rows.T, rtol=1e-5, atol=1e-2)
    # Gradients that have nothing in common are clipped to the median norm, about 1 / 64 of each.
    assert torch.nn.functional.cosine_similarity(first.double(), rows.mean(0), dim=0) > 0.99


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradient_compression_sends_as_much_at_a_time_as_latency_asks_for(
    found: dict[str, Any], world_size: int
) -> None:
    cost = found["compressed"][world_size]
    share = (1 << 23) // world_size
    assert cost.collectives == max(1, share // (1 << 16)), "64 KiB to each process, or all that there is"
    assert cost.sent == pytest.approx((1 << 23) * 516 / 512 * (1 - 1 / world_size))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_at_the_start_nobody_is_told_what_others_hold(found: dict[str, Any], world_size: int) -> None:
    cost = found["start"][world_size]
    assert cost.collectives == 1 and cost.sent <= 16
    assert cost.peak <= 200 * 4 * (-(-24_576 // world_size) + 2) + 1000


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_block_rows_are_exchanged_in_passes(found: dict[str, Any], world_size: int) -> None:
    cost = found["halos"]["costs"][world_size]
    assert cost.collectives == 2 * 20
    # The other processes do not answer: only the block rows that this one has flagged are summed.
    assert cost.sent <= 2 * (200 * 12 + 200 * 4 * 2048)
    assert cost.peak <= cost.result + 4 * 4 * AT_A_TIME


def test_64_processes_complete_the_block_rows_that_they_have_a_part_of(found: dict[str, Any]) -> None:
    weights, seen = numbered(3), 0
    for rows_of in found["halos"]["threads"]:
        for name, (start, rows) in rows_of.items():
            begin = start // 2048 * 2048
            # A slice has 384 elements: some lie in two block rows.
            end = (start + 384 - 1) // 2048 * 2048 + 2048
            assert torch.equal(rows, weights[name].flatten()[begin:end])
            seen += 1
    assert seen == 64 * 3


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ties_before_a_process_cost_no_more_for_more_processes(
    found: dict[str, Any], world_size: int
) -> None:
    costs = found["ties"]["costs"]
    assert costs[world_size, 1].sent <= 8 * world_size and costs[world_size, 1].collectives == 1
    of_layers = costs[world_size, 30_185]
    assert of_layers.sent <= 2 * 8 * (30_185 + world_size) and of_layers.collectives == 2
    assert of_layers.peak <= 6 * 8 * (30_185 + world_size)


def test_64_processes_know_how_many_ties_lie_before_them(found: dict[str, Any]) -> None:
    """256 counts of each make one table, 257 are added up in shares."""
    threads = found["ties"]["threads"]
    for case in range(4):
        total = torch.zeros_like(threads[0][case][0])
        for of_thread in threads:
            counts, before = of_thread[case]
            assert torch.equal(before, total) and before.dtype is torch.int64
            total += counts


@pytest.mark.parametrize("is_guess", [False, True])
def test_thresholds_of_many_layers_take_turns(found: dict[str, Any], is_guess: bool) -> None:
    cost = found["histograms"][4096][is_guess]
    assert cost.result == 300 * 5, "each keeps five of ten, where nobody else has any"
    assert cost.sent == pytest.approx(2 * 8 * 300 * 5120, rel=0.02)
    assert cost.peak <= 5.5 * 8 * LAYERS_AT_A_TIME * 2048


def test_as_many_processes_as_before_read_one_file_each(found: dict[str, Any]) -> None:
    loaded = found["checkpoints"]
    assert [files for files, _ in loaded["64"]] == [1] * 64
    assert max(files for files, _ in loaded["48"]) == 3, (
        "four slices became three: each lies in two, on both sides"
    )
    assert max(files for files, _ in loaded["flat"]) == 3
    assert [files for files, _ in loaded["1"]] == [64]
    assert [files for files, _ in loaded["old"]] == [64] * 2, (
        "an older file does not say what its process owned"
    )


@pytest.mark.parametrize("processes", ["64", "48", "1", "old"])
def test_each_process_loads_what_was_stored_of_its_fragments(found: dict[str, Any], processes: str) -> None:
    masks = {f"layers.{i}.weight": True for i in range(3)}
    for _, kinds in found["checkpoints"][processes]:
        assert kinds == {"mask": masks, "score": {"layers.1.weight": True}}


def test_all_processes_know_which_kinds_of_state_there_are(found: dict[str, Any]) -> None:
    """Also those that own nothing of a kind, where a technique loads by a collective."""
    loaded = [kinds for _, kinds in found["checkpoints"]["flat"]]
    assert all(kinds.keys() == {"mask", "score"} and all(kinds["mask"].values()) for kinds in loaded)
    with_scores = [kinds["score"] for kinds in loaded if kinds["score"]]
    assert 0 < len(with_scores) < 20 and all(scores == {"layers.1.weight": True} for scores in with_scores)


def test_what_is_wrong_with_a_file_is_an_error_in_every_process(found: dict[str, Any]) -> None:
    for unknown in found["checkpoints"]["unknown"]:
        assert "the checkpoint has mask of layers.2.weight, the model has not" in unknown
    for lost in found["checkpoints"]["lost"]:
        assert "lacks 40.safetensors" in lost
