"""Pruning of layers that AutoTP shards gives the run that whole layers give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multirank.launch import run_ranks
from tests.multirank.tensor_parallel import SAVED_AT, STEPS

CASES = [("l1-global", 0), ("l1-global", 1), ("taylor", 2), ("movement", 3)]
BOTH_CASES = [("l1-global", 0), ("frozen", 2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two processes that share each layer."""
    folder = str(tmp_path_factory.mktemp("tp"))
    return run_ranks(2, "tests.multirank.tensor_parallel:runs", folder=folder, cases=CASES)


@pytest.fixture(scope="module")
def with_data_parallelism(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two pairs of them."""
    folder = str(tmp_path_factory.mktemp("tp4"))
    return run_ranks(4, "tests.multirank.tensor_parallel:runs", folder=folder, cases=BOTH_CASES)


def check(result: Any) -> None:
    torch.testing.assert_close(result["losses"], result["plain"], rtol=0, atol=5e-6)
    assert result["resumed"] == result["losses"][SAVED_AT:]
    assert result["applied"] == STEPS
    assert result["metrics"].keys() == {"sparse_pruning/sparsity", "sparse_pruning/model_sparsity"}
    assert result["metrics"]["sparse_pruning/sparsity"] == 0.5
    assert 0 < result["metrics"]["sparse_pruning/model_sparsity"] < 0.5
    assert result["whole"].keys() >= result["expected"].keys()
    pruned = {name: w for name, w in result["expected"].items() if "proj" in name}
    assert len(pruned) == 14
    zeros = 0
    for name, weight in pruned.items():
        assert torch.equal(result["whole"][name] == 0, weight == 0), name
        zeros += int((weight == 0).sum())
    assert zeros == sum(weight.numel() for weight in pruned.values()) // 2


@pytest.mark.parametrize("case", CASES)
def test_masks_and_losses_are_those_of_whole_layers(alone: Any, case: tuple[str, int]) -> None:
    check(alone[0][case])
    assert alone[1][case]["whole"] == {}
    # One bit for each weight of the process' own shards.
    weights = sum(w.numel() for name, w in alone[0][case]["expected"].items() if "proj" in name)
    assert all(ranks[case]["mask_bytes"] <= weights / 16 + 14 for ranks in alone)


@pytest.mark.parametrize("case", BOTH_CASES)
def test_beside_data_parallelism(with_data_parallelism: Any, case: tuple[str, int]) -> None:
    check(with_data_parallelism[0][case])


@pytest.mark.parametrize("case", CASES)
def test_shards_are_not_taken_for_the_model(alone: Any, case: tuple[str, int]) -> None:
    for ranks in alone:
        finalized, exported, from_checkpoint = ranks[case]["refused"]
        assert finalized.startswith("finalize: AutoTP") and exported.startswith("export: AutoTP")
        assert "sharded by tensor parallelism" in from_checkpoint


def test_a_gradient_that_is_broken_in_one_shard_skips_the_step_everywhere(alone: Any) -> None:
    for ranks in alone:
        assert (ranks["broken"]["skipped"], ranks["broken"]["applied"]) == (1, 0)
        assert torch.tensor(ranks["broken"]["losses"]).isfinite().all()


def test_what_does_not_go_with_shards_is_refused(alone: Any) -> None:
    said = alone[0]["refused"]
    expected = {
        "quantization": "weight_quantization",
        "random": "sparse_pruning.shared_parameters.method",
        "2:4": "sparse_pruning.shared_parameters.pattern",
        "rows": "row_pruning",
        "layers": "layer_reduction",
    }
    for name, path in expected.items():
        assert f"compression_training.{path}" in said[name]
        assert "tensor_parallel.autotp_size" in said[name]
