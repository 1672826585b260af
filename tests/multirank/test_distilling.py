"""Distillation on every ZeRO stage: the same run whatever is sharded, and whatever is computed in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multirank.distilling import KINDS_OF_SELF, LANGUAGE_LOSSES, STAGES
from tests.multirank.launch import run_ranks


def assert_same_run(got: Any, expected: Any, tolerance: float = 2e-5) -> None:
    assert got["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    assert got["metrics"] == pytest.approx(expected["metrics"], abs=5 * tolerance)
    assert got["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=0, atol=10 * tolerance, msg=name)


@pytest.fixture(scope="module")
def languages() -> list[Any]:
    return run_ranks(2, "tests.multirank.distilling:languages")


@pytest.mark.parametrize(
    ("name", "stage"),
    [(name, stage) for name in LANGUAGE_LOSSES for stage in (STAGES[1:] if name == "every loss" else (3,))],
)
def test_every_stage_gives_the_same_run(languages: Any, name: str, stage: int) -> None:
    assert_same_run(languages[0][name, stage], languages[0][name, 0])


@pytest.mark.parametrize("name", [name for name, losses in LANGUAGE_LOSSES.items() if "logits" in losses])
def test_logits_in_chunks_and_whole_ones_give_the_same_run(languages: Any, name: str) -> None:
    assert_same_run(languages[0][name, 0], languages[0][name, "whole"])


def test_every_loss_is_there_and_moves(languages: Any) -> None:
    metrics = languages[0]["every loss", 0]["metrics"]
    assert {f"distillation/{name}" for name in LANGUAGE_LOSSES["every loss"]} == set(metrics)
    assert all(value > 0 for value in metrics.values())


def test_what_is_learned_beside_the_model_is_trained_and_then_gone(languages: Any) -> None:
    result = languages[0]["every loss", 3]
    assert {n.split(".")[1] for n in result["weights"] if "auxiliary" in n} == {
        "hidden",
        "embedding",
        "contrastive",
    }
    assert result["left"] == []


def test_the_contrastive_loss_of_two_processes_is_that_of_one_with_both_batches(languages: Any) -> None:
    alone = run_ranks(1, "tests.multirank.distilling:run", stage=0, compression=contrastive(), teacher=None)[
        0
    ]
    both = run_ranks(2, "tests.multirank.distilling:run", stage=0, compression=contrastive(), teacher=None)
    mean = sum(result["metrics"]["distillation/contrastive"] for result in both) / 2
    assert mean == pytest.approx(alone["metrics"]["distillation/contrastive"], abs=1e-4)


def contrastive() -> dict[str, Any]:
    losses = {"contrastive": {"dimension": 8, "queue": 12}}
    return {
        "distillation": {
            "enabled": True,
            "losses": losses,
            "self_teacher": {"weights": "initial"},
        }
    }


def test_bf16_in_chunks_is_as_near_as_bf16_can_be(languages: Any) -> None:
    chunked, whole = languages[0]["bf16"]
    assert chunked["losses"] == pytest.approx(whole["losses"], abs=0.02)


def test_an_offloaded_teacher_says_the_same(languages: Any) -> None:
    assert_same_run(languages[0]["offload"], languages[0]["every loss", 2])


def test_without_labels_the_loss_is_the_imitation(languages: Any) -> None:
    runs = languages[0]["label free"]
    assert_same_run(runs[3], runs[0])
    metrics = runs[0]["metrics"]
    weights = {name: loss.get("weight", 1.0) for name, loss in LANGUAGE_LOSSES["every loss"].items()}
    total = sum(weights[name.split("/")[1]] * value for name, value in metrics.items())
    assert runs[0]["losses"][-1] == pytest.approx(total, rel=1e-5)


@pytest.fixture(scope="module")
def selves(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(2, "tests.multirank.distilling:selves", folder=str(tmp_path_factory.mktemp("selves")))[0]


@pytest.mark.parametrize("weights", KINDS_OF_SELF)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_teaches_itself_alike_on_every_stage(selves: Any, weights: str, stage: int) -> None:
    # A weight on the edge between two codes may fall to either side.
    assert_same_run(selves[weights, stage], selves[weights, 0], tolerance=5e-4)
    assert selves[weights, stage]["metrics"]["distillation/logits"] > 0


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_average_is_exact_and_survives_a_checkpoint(selves: Any, stage: int) -> None:
    result = selves["resumed", stage]
    assert result["expected"].keys() == result["found"].keys()
    for name, value in result["expected"].items():
        torch.testing.assert_close(result["found"][name], value, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def layer_by_layer() -> Any:
    return run_ranks(2, "tests.multirank.distilling:layer_by_layer")


@pytest.mark.parametrize(
    ("name", "stage"),
    [("weights", 0), ("weights", 2), ("weights", 3), ("bf16", 3), ("static and sparse", 3)],
)
def test_each_layer_learns_what_it_was(layer_by_layer: Any, name: str, stage: int) -> None:
    one, two = (ranks[name, stage] for ranks in layer_by_layer)
    assert len(one["results"]) == 2
    for result in one["results"]:
        assert 0 < result.after < 0.98 * result.before, result
    assert one["results"] == two["results"]
    assert one["masters follow"] and two["masters follow"]


def test_layers_learn_the_same_on_every_stage(layer_by_layer: Any) -> None:
    first, *others = (layer_by_layer[0]["weights", stage]["weights"] for stage in (0, 2, 3))
    for other in others:
        for name, weight in first.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_zeros_stay_zero_layer_by_layer(layer_by_layer: Any) -> None:
    weights = layer_by_layer[0]["static and sparse", 3]["weights"]
    pruned = [weight for name, weight in weights.items() if ".mlp." in name]
    assert len(pruned) == 6
    assert all(int(weight.count_nonzero()) <= weight.numel() // 2 for weight in pruned)


def test_the_whole_model_teaches_what_is_left_of_it(selves: Any) -> None:
    assert not [name for name in selves["cut"]["weights"] if "layers.1" in name]
    assert selves["cut"]["metrics"]["distillation/logits"] > 0


def test_each_process_holds_its_share_of_the_teacher_from_loading_on(tmp_path: Any) -> None:
    for result in run_ranks(2, "tests.multirank.distilling:teacher_bytes", folder=str(tmp_path)):
        assert result["sharded when loaded"]
        assert result["here"] <= 0.55 * result["whole"]
