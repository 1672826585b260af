"""Quantization blocks on fused experts: what they reach, and what is refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from ds_compress import ConfigError, plan
from tests.zoo.expert_reference import blocks
from tests.zoo.mixtures import mixture

_INT8 = {"target_bits": 8, "granularity": "per_channel"}


def _claimed(model: Any, block: dict[str, Any], key: str = "weight_quantization") -> list[str]:
    return [target.module_name for target in plan(model, block).techniques[key].targets]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4"])
def test_every_layer_means_experts_and_no_router(name: str) -> None:
    for block in (blocks(_INT8), {"scheme": "FP8_DYNAMIC"}):
        names = _claimed(mixture(name), block)
        assert any(n.endswith("experts.gate_up_proj") for n in names)
        assert any(n.endswith("experts.down_proj") for n in names)
        assert not any(n.endswith((".gate", ".router")) for n in names)
        assert ("lm_head" in names) == ("scheme" not in block)


def test_shared_experts_are_layers() -> None:
    names = _claimed(mixture("deepseek_v3"), {"scheme": "FP8_DYNAMIC"}, "activation_quantization")
    assert "model.layers.1.mlp.shared_experts.up_proj" in names
    assert "model.layers.1.mlp.experts.down_proj" in names


def test_the_two_matrices_may_differ() -> None:
    block = blocks(_INT8)
    group = block["weight_quantization"]["different_groups"].pop("g")
    block["weight_quantization"]["different_groups"] = {
        "up": {**group, "modules": ["gate_up_proj"]},
        "down": {"params": {"target_bits": 4}, "modules": ["down_proj"]},
    }
    names = _claimed(mixture("qwen3_moe"), block)
    assert len(names) == 4


@pytest.mark.parametrize(
    ("block", "path", "words"),
    [
        (
            blocks(_INT8, {"bits": 8}, weight_quantization={"kernel": "int8"}),
            "weight_quantization.shared_parameters.kernel",
            "int8 product for several matrices",
        ),
        (
            blocks({"format": "fp8_e4m3"}, {"format": "fp8_e4m3"}, weight_quantization={"kernel": "fp8"}),
            "weight_quantization.shared_parameters.kernel",
            'set kernel to "float"',
        ),
        (
            blocks(_INT8, weight_quantization={"frozen_weights": "packed"}),
            "weight_quantization.shared_parameters.frozen_weights",
            "frozen weights of Linear layers",
        ),
        (
            blocks({"target_bits": 8}, weight_quantization={"quantize_groups": 5}),
            "weight_quantization.shared_parameters.quantize_groups",
            "each expert's matrix",
        ),
        (
            {"scheme": {"NVFP4A16": ["down_proj"]}},
            "weight_quantization.different_groups.NVFP4A16.params.format",
            "(12 inputs)",
        ),
    ],
)
def test_refused(block: dict[str, Any], path: str, words: str) -> None:
    model = mixture("qwen3_moe").requires_grad_(False)
    for settings in block.values():
        for group in settings.get("different_groups", {}).values():
            group.setdefault("modules", ["experts"])
    with pytest.raises(ConfigError) as raised:
        plan(model, block)
    assert [problem.path for problem in raised.value.problems] == [f"compression_training.{path}"]
    assert words in str(raised.value)


@pytest.mark.parametrize("kernel", ["deepgemm", "sonicmoe"])
def test_inputs_of_one_kernel_for_all(kernel: str) -> None:
    model: Any = mixture("qwen3_moe")
    model.config._experts_implementation = kernel
    plan(model, blocks(_INT8))
    with pytest.raises(ConfigError, match=f'whose experts implementation is "{kernel}"'):
        plan(model, blocks(_INT8, {"bits": 8}))


def test_groups_count_for_each_matrix() -> None:
    """4 x 24 x 16 weights divide by 512, those of one matrix do not."""
    with pytest.raises(ConfigError, match="512 with"):
        plan(
            mixture("qwen3_moe"),
            {
                "weight_quantization": {
                    "shared_parameters": {"enabled": True, "quantize_groups": 512},
                    "different_groups": {"g": {"params": {"target_bits": 8}, "modules": ["gate_up_proj"]}},
                }
            },
        )
