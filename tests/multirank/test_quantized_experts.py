"""Quantized experts on every ZeRO stage, from JSON alone: the same losses and exports, no NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multirank.launch import run_ranks
from tests.multirank.quantized_experts import BLOCKS, STAGES

NAMES = ("qwen3_moe", "gpt_oss", "llama4")
Runs = list[dict[Any, Any]]


@pytest.fixture(scope="module")
def runs() -> Runs:
    return run_ranks(2, "tests.multirank.quantized_experts:trained")


@pytest.mark.parametrize("key", BLOCKS)
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_weights_are_those_of_stage_0(runs: Runs, name: str, key: str) -> None:
    reference, plain = runs[0][name, key, 0], runs[0][name, "plain", 0]
    assert reference["losses"] != plain["losses"]
    for stage in STAGES[1:]:
        found = runs[0][name, key, stage]
        assert found["losses"] == pytest.approx(reference["losses"], abs=1e-5), stage
        for weight, values in reference["final"].items():
            assert bool(values.isfinite().all()), weight
            torch.testing.assert_close(found["final"][weight], values, rtol=0, atol=1e-4)
        assert found["exported"].keys() == reference["exported"].keys()


@pytest.mark.parametrize("key", ["int4", "learned", "nvfp4"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_export_is_on_the_grid_of_each_expert(runs: Runs, key: str, stage: int) -> None:
    exported = runs[0]["qwen3_moe", key, stage]["exported"]
    stack = exported["model.layers.0.mlp.experts.gate_up_proj"]
    groups = stack.view(-1, 8)
    assert max(len(group.abs().unique()) for group in groups) <= 9
    assert not any(name.endswith("_step_size") for name in exported)


def test_an_expert_that_saw_no_token_keeps_its_weights_but_for_decay(runs: Runs) -> None:
    """Adam moves a weight whose gradient was never other than zero by its decay alone."""
    found = run_ranks(
        2,
        "tests.multirank.quantized_experts:trained",
        names=["qwen3_moe"],
        blocks=["static inputs"],
        steps=1,
        experts=16,
    )
    before = found[0]["qwen3_moe", "initial"]
    idle_somewhere = False
    for stage in STAGES:
        result = found[0]["qwen3_moe", "static inputs", stage]
        assert all(bool(values.isfinite().all()) for values in result["final"].values())
        for layer in (0, 1):
            name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
            unseen = result["ranges"][name].isnan().any(1)
            idle_somewhere |= bool(unseen.any())
            moved = (result["final"][name] - before[name] * (1 - 1e-3 * 1e-2)).abs().amax((1, 2))
            assert bool((moved[unseen] < 1e-7).all()) and bool((moved[~unseen] > 1e-5).all())
    assert idle_somewhere


def test_ranges_are_reduced_over_processes_that_saw_other_tokens() -> None:
    found = run_ranks(
        2,
        "tests.multirank.quantized_experts:trained",
        names=["qwen3_moe"],
        blocks=["static inputs"],
        steps=2,
        alike=False,
    )
    for stage in STAGES:
        own, other = (process["qwen3_moe", "static inputs", stage]["ranges"] for process in found)
        reference = found[0]["qwen3_moe", "static inputs", 0]["ranges"]
        assert len(own) == 4
        for name, ranges in own.items():
            assert torch.equal(ranges.nan_to_num(7), other[name].nan_to_num(7)), name
            assert ranges.shape == (4, 2)
            torch.testing.assert_close(ranges, reference[name], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_half_precision() -> None:
    found = run_ranks(
        2,
        "tests.multirank.quantized_experts:trained",
        names=["qwen3_moe", "gpt_oss"],
        blocks=["static inputs", "learned nvfp4"],
        dtype="bf16",
        stages=(2, 3),
    )[0]
    for (name, key, *stages), result in found.items():
        if key == "initial":
            continue
        if stages == [3]:
            assert result["losses"] == pytest.approx(found[name, key, 2]["losses"], abs=2e-2)
        assert all(bool(values.isfinite().all()) for values in result["final"].values())


@pytest.fixture(scope="module")
def shrunk() -> Any:
    return run_ranks(2, "tests.multirank.quantized_experts:shrunk")[0]


@pytest.mark.parametrize("key", ["int4", "learned", "static inputs", "nvfp4"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_that_leave_take_their_scales_and_ranges_along(shrunk: Any, name: str, key: str) -> None:
    for stage in STAGES:
        smaller, masked = shrunk[name, key, stage, True], shrunk[name, key, stage, False]
        assert smaller["losses"] == masked["losses"]
        assert smaller["losses"] == pytest.approx(shrunk[name, key, 0, True]["losses"], abs=1e-5)
        assert smaller["shapes"]["model.layers.0.mlp.experts.down_proj"][0] == 2
        assert all(tuple(ranges.shape) == (2, 2) for ranges in smaller["ranges"].values())


@pytest.fixture(scope="module")
def variants() -> dict[Any, list[float]]:
    return run_ranks(2, "tests.multirank.quantized_experts:variants")[0]


@pytest.mark.parametrize("key", ["int4", "static"])
def test_implementations_and_checkpointing(variants: dict[Any, list[float]], key: str) -> None:
    reference = variants[key, 0, "eager", "none"]
    for (block, *how), losses in variants.items():
        if block == key:
            assert losses == pytest.approx(reference, abs=1e-5), how
