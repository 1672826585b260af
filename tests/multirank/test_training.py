"""QAT, layer reduction and distillation on every ZeRO stage, from JSON alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multirank.launch import run_ranks
from tests.multirank.training import QUANTIZATIONS, STAGES


@pytest.fixture(scope="module")
def losses() -> list[dict[Any, Any]]:
    return run_ranks(2, "tests.multirank.training:plain_and_quantized")


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_losses_differ_between_stages_no_more_than_in_plain_deepspeed(losses: Any, name: str) -> None:
    def spread(kind: str) -> float:
        rows = torch.tensor([losses[0][kind, stage] for stage in STAGES])
        return float((rows.max(0).values - rows.min(0).values).max())

    # A weight on the edge between two codes may fall to either side: allow one such flip beyond rounding.
    assert spread(name) <= spread("plain") + 2e-4
    assert losses[0][name, 0] != losses[0]["plain", 0]


def test_static_ranges_are_equal_in_every_process(losses: Any) -> None:
    for stage in STAGES:
        ranges = losses[0]["ranges", stage]
        assert len(ranges) == 12
        assert ranges == losses[1]["ranges", stage]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(tmp_path_factory.mktemp("everything"))
    return run_ranks(2, "tests.multirank.training:everything", folder=folder)


@pytest.mark.parametrize("stage", STAGES)
def test_everything_at_once_gives_the_same_run_on_every_stage(everything: Any, stage: int) -> None:
    result, reference = everything[0][stage], everything[0][0]
    assert result["layers"] == 2
    torch.testing.assert_close(result["losses"], reference["losses"], rtol=1e-5, atol=1e-6)
    assert result["metrics"]["sparse_pruning/sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert result["metrics"]["weight_quantization/mean_bits"] == 8
    for kind in ("logits", "hidden", "attention"):
        assert 0 < result["metrics"][f"distillation/{kind}"] < 10
    assert result["resumed_equal"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_export_is_sparse_and_on_the_grid(everything: Any, stage: int) -> None:
    exported = everything[0][stage]["exported"]
    assert everything[1][stage]["exported"] == {}
    weight = exported["bert.encoder.layer.1.intermediate.dense.weight"]
    assert int(weight.count_nonzero()) <= weight.numel() // 2
    codes = weight / (weight.abs().amax(1, keepdim=True) / 127)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    trained = everything[0][stage]["final"]["bert.encoder.layer.1.intermediate.dense.weight"]
    assert not torch.equal(weight, trained)


@pytest.fixture(scope="module")
def teachers() -> Any:
    return run_ranks(2, "tests.multirank.training:teachers")[0]


@pytest.mark.parametrize("stage", (0, 2, 3))
@pytest.mark.parametrize("teacher_stage", (0, 3))
def test_a_teacher_object_is_imitated_under_any_pair_of_stages(
    teachers: Any, stage: int, teacher_stage: int
) -> None:
    result, reference = teachers[stage, teacher_stage], teachers[0, 0]
    assert result["initialised"]
    torch.testing.assert_close(result["losses"], reference["losses"], rtol=1e-5, atol=1e-6)
    assert result["kd"]["distillation/logits"] == pytest.approx(
        reference["kd"]["distillation/logits"], rel=0.05
    )
    assert result["resident"] <= (0.55 if teacher_stage == 3 else 1.0)
