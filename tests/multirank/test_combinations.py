"""Compression beside accumulation, checkpointing, autocast, offload, compilation, ties, frozen weights and LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multirank.combinations import FEATURES, FROZEN, STAGES, STEPS, frozen_stages
from tests.multirank.launch import run_ranks

SAME_ARITHMETIC = ("checkpointing", "checkpointing-reentrant", "offload_optimizer", "offload_param")
COMPILED = ("torch.compile", "engine.compile")


@pytest.fixture(scope="module")
def features() -> Any:
    return run_ranks(2, "tests.multirank.combinations:features")


RUNS = [(name, stage) for name, feature in FEATURES.items() for stage in feature.stages]


@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_half_of_every_weight_is_zero_and_no_step_is_lost(features: Any, name: str, stage: int) -> None:
    result = features[0][name, stage]
    assert len(result["weights"]) == 12
    for weight in result["weights"].values():
        assert int(weight.count_nonzero()) == weight.numel() // 2
    assert result["applied"] == STEPS
    assert 0 < result["metrics"].pop("sparse_pruning/model_sparsity", 0.1) < 0.5
    assert result["metrics"] == {
        "sparse_pruning/sparsity": 0.5,
        "weight_quantization/mean_bits": 8.0,
        "activation_quantization/mean_bits": 8.0,
    }


@pytest.mark.parametrize(("name", "stage"), [run for run in RUNS if run[0] in SAME_ARITHMETIC])
def test_what_only_moves_or_repeats_work_changes_nothing(features: Any, name: str, stage: int) -> None:
    result, plain = features[0][name, stage], features[0]["plain", stage]
    assert result["losses"] == plain["losses"]
    for key, weight in plain["weights"].items():
        torch.testing.assert_close(result["weights"][key], weight, rtol=0, atol=1e-7)
        assert torch.equal(result["weights"][key] != 0, weight != 0)


@pytest.mark.parametrize(("name", "stage"), [run for run in RUNS if run[0] in COMPILED])
def test_a_compiled_model_trains_as_the_plain_one(features: Any, name: str, stage: int) -> None:
    result, plain = features[0][name, stage], features[0]["plain", stage]
    torch.testing.assert_close(result["losses"], plain["losses"], rtol=0, atol=1e-5)
    for key, weight in plain["weights"].items():
        assert torch.equal(result["weights"][key] != 0, weight != 0)


@pytest.mark.parametrize("stage", STAGES)
def test_micro_steps_are_one_step(features: Any, stage: int) -> None:
    result, plain = features[0]["accumulation", stage], features[0]["plain", stage]
    means = [sum(result["losses"][2 * step : 2 * step + 2]) / 2 for step in range(STEPS)]
    torch.testing.assert_close(means, plain["losses"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["torch_autocast", "bf16"])
def test_sixteen_bits_train_alike_on_every_stage(features: Any, name: str) -> None:
    for stage in STAGES:
        # bf16 has 8 bits: a loss near 0.7 is a multiple of 0.004
        torch.testing.assert_close(
            features[0][name, stage]["losses"], features[0]["plain", 0]["losses"], rtol=0, atol=8e-3
        )


@pytest.mark.parametrize("stage", STAGES[1:])
def test_stages_agree(features: Any, stage: int) -> None:
    for key, weight in features[0]["plain", 0]["weights"].items():
        assert torch.equal(features[0]["plain", stage]["weights"][key] != 0, weight != 0)


@pytest.fixture(scope="module")
def tied() -> Any:
    return run_ranks(2, "tests.multirank.combinations:tied")[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_tied_table_is_pruned_once_and_stays_tied(tied: Any, stage: int) -> None:
    result = tied[stage]
    assert result["tied"] and result["equal"]
    assert "lm_head.weight" not in result["weights"]
    table = result["weights"]["model.embed_tokens.weight"]
    assert int(table.count_nonzero()) == table.numel() // 2
    torch.testing.assert_close(result["losses"], tied[0]["losses"], rtol=0, atol=1e-6)
    for key, weight in tied[0]["weights"].items():
        assert torch.equal(result["weights"][key] != 0, weight != 0)


FROZEN_RUNS = [(name, stage) for name in FROZEN for stage in frozen_stages(name)]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(tmp_path_factory.mktemp("frozen"))
    return run_ranks(2, "tests.multirank.combinations:frozen", folder=folder)


@pytest.mark.parametrize(("name", "stage"), FROZEN_RUNS)
def test_weights_that_no_optimizer_steps_are_masked(frozen: Any, name: str, stage: int) -> None:
    result = frozen[0][name, stage]
    still = {key: weight for key, weight in result["weights"].items() if "layer.0" in key}
    assert len(still) == 6
    for key, weight in still.items():
        # A kept element has its old value; of all others the mask has made zeros.
        before = result["before"][key]
        expected = before.bfloat16().float() if "bf16" in name else before
        assert torch.equal(weight[weight != 0], expected[weight != 0])
        assert 0.3 < float((weight == 0).float().mean()) < 0.7
        assert float(expected[weight == 0].abs().max()) <= float(weight[weight != 0].abs().min())
    zeros = sum(int((weight == 0).sum()) for weight in result["weights"].values())
    assert zeros == sum(weight.numel() for weight in result["weights"].values()) // 2
    for key, weight in frozen[1][name, stage]["weights"].items():
        assert torch.equal(weight, result["weights"][key]), f"{key} differs between processes"
    assert result["forward"] == frozen[1][name, stage]["forward"]


@pytest.mark.parametrize(("name", "stage"), [run for run in FROZEN_RUNS if run[1]])
def test_frozen_weights_have_the_same_masks_on_every_stage(frozen: Any, name: str, stage: int) -> None:
    result, reference = frozen[0][name, stage], frozen[0][name, 0]
    if "bf16" not in name:  # whose losses differ between stages in plain DeepSpeed, too
        torch.testing.assert_close(result["losses"], reference["losses"], rtol=0, atol=1e-6)
        for key, weight in reference["weights"].items():
            assert torch.equal(result["weights"][key] != 0, weight != 0)
    # One bit per weight over the processes, whether it trains or not.
    assert result["mask_bytes"] <= 0.55 * reference["mask_bytes"]


@pytest.mark.parametrize(("name", "stage"), FROZEN_RUNS)
def test_masks_return_to_frozen_weights_that_no_checkpoint_had(frozen: Any, name: str, stage: int) -> None:
    result = frozen[0][name, stage]
    for key, weight in result["weights"].items():
        assert torch.equal(result["loaded"][key], weight), key
    assert result["loaded_forward"] == result["forward"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(2, "tests.multirank.combinations:lora", folder=str(tmp_path_factory.mktemp("lora")))


@pytest.mark.parametrize("stage", STAGES)
def test_lora_prunes_the_base_and_leaves_adapters_alone(lora: Any, stage: int) -> None:
    result = lora[0][stage]
    layers = [f"base_model.model.model.layers.{i}" for i in range(2)]
    names = ("self_attn.q_proj.base_layer", "self_attn.k_proj", "mlp.down_proj.base_layer")
    expected = [f"{layer}.{name}" for layer in layers for name in names]
    assert list(result["claimed"].values()) == [expected] * 3
    for name, weight in result["weights"].items():
        assert int(weight.count_nonzero()) == weight.numel() // 2
        assert torch.equal(weight[weight != 0], result["before"][name][weight != 0])
        assert float(result["before"][name][weight == 0].abs().max()) <= float(
            weight[weight != 0].abs().min()
        )
    assert result["adapters_moved"]
    for name, weight in result["others"].items():
        if "lora_" in name:
            assert int(weight.count_nonzero()) == weight.numel()
    torch.testing.assert_close(result["losses"], lora[0][0]["losses"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_merge_keeps_every_pruned_weight_zero(lora: Any, stage: int) -> None:
    result = lora[0][stage]
    assert result["class"] == "LlamaForCausalLM"
    for name, weight in result["weights"].items():
        merged = result["merged"][name.removeprefix("base_model.model.").replace(".base_layer", "")]
        assert torch.equal(merged != 0, weight != 0)
        is_adapted = "base_layer" in name
        assert torch.equal(merged, weight) != is_adapted
        if is_adapted:
            prefix = name.removesuffix("base_layer.weight")
            update = 2.0 * (
                result["others"][f"{prefix}lora_B.default.weight"]
                @ result["others"][f"{prefix}lora_A.default.weight"]
            )
            torch.testing.assert_close(merged, (weight + update) * (weight != 0))


@pytest.mark.parametrize("stage", STAGES)
def test_a_merged_model_is_exported_on_its_grid(lora: Any, stage: int) -> None:
    """`torch` stores codes: the loaded model computes with rounded weights, as the quantizers of the merged one do."""
    merged, loaded = lora[0][stage]["logits"]
    torch.testing.assert_close(loaded, merged, rtol=0, atol=1e-5)
