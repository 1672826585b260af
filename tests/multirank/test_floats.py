"""Float formats on every ZeRO stage, from JSON alone: the same losses, the same bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multirank.floats import BLOCKS, STAGES
from tests.multirank.launch import run_ranks


@pytest.fixture(scope="module")
def runs() -> list[dict[Any, Any]]:
    return run_ranks(2, "tests.multirank.floats:trained")


@pytest.mark.parametrize("name", BLOCKS)
def test_losses_are_those_of_stage_0(runs: Any, name: str) -> None:
    reference = runs[0][name, 0]["losses"]
    for stage in STAGES:
        # A weight on the edge between two numbers may fall to either side: allow a few such flips beyond rounding.
        assert runs[0][name, stage]["losses"] == pytest.approx(reference, abs=2e-3), stage
    assert reference != runs[0]["plain", 0]["losses"]


@pytest.mark.parametrize("name", BLOCKS)
def test_the_export_has_values_of_the_format_and_is_the_same_on_every_stage(runs: Any, name: str) -> None:
    reference = runs[0][name, 0]["exported"]
    for stage in STAGES:
        exported = runs[0][name, stage]["exported"]
        assert exported.keys() == reference.keys()
        for key, value in exported.items():
            torch.testing.assert_close(value, reference[key], rtol=0, atol=2e-2)
    weight = reference["model.layers.0.mlp.up_proj.weight"]
    if name in ("NVFP4", "static", "searched", "learned", "scales only", "schedule", "pruned", "mixed"):
        # At most 15 different values in a block of 16 of NVFP4: magnitudes 0 to 6 in eight steps.
        blocks = weight.view(-1, 16)
        for block in blocks[:50]:
            assert len(block.abs().unique()) <= 8
    if name == "pruned":
        assert int(weight.count_nonzero()) <= weight.numel() // 2


def test_a_run_is_the_same_on_one_process_and_on_two() -> None:
    arguments: dict[str, Any] = {"names": ("NVFP4", "MXFP4", "kv cache", "learned"), "stages": (0, 2, 3)}
    one, two = (
        run_ranks(size, "tests.multirank.floats:trained", same_data=True, **arguments)[0] for size in (1, 2)
    )
    assert one.keys() == two.keys()
    for key, alone in one.items():
        assert alone["losses"] == two[key]["losses"], key
        for name, value in alone.get("exported", {}).items():
            assert torch.equal(value, two[key]["exported"][name]), (key, name)


def test_what_servers_fuse_shares_a_global_scale(runs: Any) -> None:
    for name in ("NVFP4", "pruned", "learned"):
        for stage in STAGES:
            scales = runs[0][name, stage]["global"]
            assert scales == runs[1][name, stage]["global"]
            for layer in ("model.layers.0", "model.layers.1"):
                assert len({scales[f"{layer}.self_attn.{part}_proj"] for part in "qkv"}) == 1
                assert scales[f"{layer}.mlp.gate_proj"] == scales[f"{layer}.mlp.up_proj"]
                assert scales[f"{layer}.mlp.gate_proj"] != scales[f"{layer}.mlp.down_proj"]


def test_scales_alone_train(runs: Any) -> None:
    before = runs[0]["scales only", 0]
    for stage in STAGES:
        final = runs[0]["scales only", stage]["final"]
        for key, value in before["final"].items():
            if not key.endswith("weight_step_size"):
                assert torch.equal(final[key], value)
    losses = before["losses"]
    assert len(set(losses)) == len(losses)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(2, "tests.multirank.floats:lora", folder=str(tmp_path_factory.mktemp("lora")))[0]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_packed_base_trains_its_adapters_as_a_rounded_one_does(lora: Any, stage: int) -> None:
    full, packed = lora["full", stage], lora["packed", stage]
    assert packed["losses"] == full["losses"] == pytest.approx(lora["full", 0]["losses"], abs=1e-5)
    assert packed["resumed"] == packed["losses"][2:] and full["resumed"] == full["losses"][2:]
    weights = sum(v.numel() for name, v in packed["merged"].items() if "_proj" in name)
    assert packed["resident"] * 8 / weights < 4.6  # 4.5 bits, and the global scales of tiny layers
    for name, value in packed["merged"].items():
        if "o_proj" in name:  # without an adapter: what forward computed with
            assert len(value.view(-1, 16)[3].abs().unique()) <= 8
    adapted_weight = "model.layers.0.mlp.up_proj.weight"
    difference = packed["merged"][adapted_weight] - full["merged"][adapted_weight]
    assert 0 < difference.abs().max() < 0.05  # the merge adds to the rounded base, or to the exact one
