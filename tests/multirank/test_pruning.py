"""Sparse pruning gives one answer: on every ZeRO stage, at every world size, under every wrapper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.multirank.launch import run_ranks
from tests.multirank.pruning import METHODS, STAGES, WRAPPERS

# Everything at two processes; enough of it at one and four to show that the number does not matter.
RUNS = {
    1: ((0, 3), tuple(METHODS)),
    2: (STAGES, tuple(METHODS)),
    4: ((0, 2, 3), ("l1", "l1-cubic-global", "topk", "movement", "snip_momentum-4x1")),
}


@pytest.fixture(scope="module")
def by_world_size() -> dict[int, dict[tuple[str, int], dict[str, Any]]]:
    results = {}
    for world_size, (stages, methods) in RUNS.items():
        function = "tests.multirank.pruning:masks_of_methods"
        ranks = run_ranks(world_size, function, stages=stages, methods=methods)
        results[world_size] = ranks[0]
        for key, own in ranks[0].items():
            own["mask_bytes_by_rank"] = [rank[key]["mask_bytes"] for rank in ranks]
    return results


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_bitwise_equal_over_stages_and_world_sizes(by_world_size: Any, method: str) -> None:
    reference = by_world_size[1][method, 0]
    assert reference["metrics"]["sparse_pruning/sparsity"] > 0.4
    for world_size, results in by_world_size.items():
        for (_, stage), got in _of_method(results, method):
            for name, weights in reference["weights"].items():
                same = torch.equal(weights != 0, got["weights"][name] != 0)
                assert same, f"{name} at stage {stage}, world size {world_size}"
            torch.testing.assert_close(got["losses"], reference["losses"], rtol=1e-5, atol=1e-6)


def _of_method(results: Any, method: str) -> list[Any]:
    return [(key, result) for key, result in results.items() if key[0] == method]


@pytest.mark.parametrize("method", ["l1", "topk", "random"])
def test_sparsity_is_exact_to_the_weight(by_world_size: Any, method: str) -> None:
    for results in by_world_size.values():
        for _, result in _of_method(results, method):
            for name, weights in result["weights"].items():
                assert int(weights.count_nonzero()) == math.ceil(0.3 * weights.numel()), name


def test_global_sparsity_is_exact_in_sum(by_world_size: Any) -> None:
    for results in by_world_size.values():
        for _, result in _of_method(results, "l1-cubic-global"):
            weights = result["weights"].values()
            total = sum(w.numel() for w in weights)
            assert sum(int(w.count_nonzero()) for w in weights) == math.ceil(0.3 * total)


def test_two_of_four_inputs_survive(by_world_size: Any) -> None:
    for weights in by_world_size[2]["l1-2:4", 3]["weights"].values():
        assert int((weights.view(-1, 4) != 0).sum(1).max()) == 2
        assert int((weights != 0).sum()) == weights.numel() // 2


def test_blocks_live_or_die_whole(by_world_size: Any) -> None:
    for weights in by_world_size[4]["snip_momentum-4x1", 2]["weights"].values():
        rows, columns = weights.shape
        alive = (weights.view(rows // 4, 4, columns) != 0).sum(1)
        assert set(alive.unique().tolist()) <= {0, 4}


def test_the_blocks_of_the_sparse_kernel_are_kept_to_the_block(by_world_size: Any) -> None:
    """4 outputs x 16 inputs, cut by the borders of partitions."""
    for results in by_world_size.values():
        for _, result in _of_method(results, "l1-4x16"):
            for name, weights in result["weights"].items():
                rows, columns = weights.shape
                blocks = F.pad(weights, (0, -columns % 16, 0, -rows % 4))
                blocks = blocks.view(-(-rows // 4), 4, -(-columns // 16), 16)
                alive = blocks.count_nonzero((1, 3))
                assert int((alive > 0).sum()) == math.ceil(0.3 * alive.numel()), name
                full = alive[: rows // 4, : columns // 16]
                assert set(full.unique().tolist()) <= {0, 64}, name


def test_masks_cost_one_bit_per_weight_spread_over_the_processes(by_world_size: Any) -> None:
    for world_size, results in by_world_size.items():
        for (_, stage), result in _of_method(results, "l1"):
            weights = sum(w.numel() for w in result["weights"].values())
            copies = world_size if stage == 0 else 1
            # Rounding up to whole bytes, once per fragment.
            slack = world_size * len(result["weights"])
            assert 0 <= sum(result["mask_bytes_by_rank"]) - copies * weights / 8 <= slack


def test_sparsity_is_exact_after_fifty_steps() -> None:
    for rank in run_ranks(2, "tests.multirank.pruning:fifty_steps"):
        for counts in rank.values():
            assert len(counts) == 10
            assert all(alive == math.ceil(0.3 * numel) for alive, numel in counts.values())


@pytest.fixture(scope="module")
def by_wrapper() -> dict[str, dict[str, Any]]:
    return run_ranks(2, "tests.multirank.pruning:wrappers")[0]


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_keeps_the_mask_exactly(by_wrapper: Any, name: str) -> None:
    result = by_wrapper[name]
    assert result["applied"] == len(result["kept"])
    for step, kept in enumerate(result["kept"]):
        for weight, count in kept.items():
            assert count == math.ceil(0.3 * result["numel"][weight]), f"{weight} after step {step + 1}"


def test_the_wrappers_are_the_ones_we_think(by_wrapper: Any) -> None:
    assert {result["wrapper"] for result in by_wrapper.values()} == {
        "AdamW",
        "FP16_UnfusedOptimizer",
        "BF16_Optimizer",
        "DeepSpeedZeroOptimizer",
        "DeepSpeedZeroOptimizer_Stage3",
    }


@pytest.fixture(scope="module")
def by_fault() -> dict[Any, Any]:
    return run_ranks(2, "tests.multirank.pruning:faults")[0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_nan_gradient_skips_the_step_and_is_not_counted(by_fault: Any, stage: int, dtype: str) -> None:
    result = by_fault[stage, dtype]
    assert result["unchanged"]
    assert (result["counted"], result["then"], result["skipped"]) == (1, 4, 1)
    assert result["finite"]
    assert result["sparsity"] == pytest.approx(0.7, abs=1e-2)
