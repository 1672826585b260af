"""Every recipe trains on ZeRO 2 and 3, alike, and does what it says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ds_compress.config.recipes import newest
from tests.multirank.launch import run_ranks
from tests.multirank.recipes import BAD_WORKER, STAGES, STEPS

ON_THREE = ["bad_workers"]
EXPORTED = {"w4a16": "compressed-tensors", "ternary": "torch", "all_in_one": "torch"}
MEAN_BITS = {
    "w8a16": (8, None),
    "w8a8": (8, 8),
    "w4a16": (4, None),
    "fp8": (8, 8),
    "nvfp4_qad": (4, 4),
    "mxfp4": (4, 4),
    "ternary": (2, None),
    "all_in_one": (8, 8),
    # FP8 in the attention of a tiny Llama, NVFP4 in its feed-forward blocks.
    "llm": (pytest.approx((65_536 * 8 + 98_304 * 4) / 163_840), pytest.approx((8 * 8 + 6 * 4) / 14)),
    "lora": (4, None),
}
"""Of weights and inputs."""
MOST_VALUES = {
    "w8a16": 255,
    "w8a8": 255,
    "w4a16": 16,
    "nvfp4_qad": 15,
    "mxfp4": 15,
    "ternary": 3,
    "all_in_one": 255,
}
"""Different values of a weight among those that share a scale."""
SHARED_BY = {"w8a16": 128, "w4a16": 128, "nvfp4_qad": 16, "mxfp4": 32}
"""How many inputs share a scale; else all of an output do."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = str(tmp_path_factory.mktemp("recipes"))
    arguments = {"folder": folder, "exported": EXPORTED}
    on_two = [name for name in newest() if name not in ON_THREE]
    two = run_ranks(2, "tests.multirank.recipes:trained", names=on_two, **arguments)
    three = run_ranks(3, "tests.multirank.recipes:trained", names=ON_THREE, **arguments)
    return {**two[0], **three[0]}


CASES = pytest.mark.parametrize(("name", "stage"), [(name, stage) for name in newest() for stage in STAGES])


@CASES
def test_it_trains(runs: Any, name: str, stage: int) -> None:
    result = runs[name, stage]
    assert result["applied"] == STEPS == len(result["losses"])
    assert all(map(math.isfinite, result["losses"]))
    assert all(bool(value.isfinite().all()) for value in result["weights"].values())
    assert all(math.isfinite(value) for value in result["metrics"].values())


@pytest.mark.parametrize("name", newest())
def test_it_is_the_same_on_both_stages(runs: Any, name: str) -> None:
    two, three = (runs[name, stage] for stage in STAGES)
    assert two["losses"] == pytest.approx(three["losses"], abs=2e-2)
    assert two["sizes"] == three["sizes"]
    # At stage 3 nobody has a copy to refresh.
    assert two["metrics"].keys() - three["metrics"].keys() <= {"parameter_compression/refreshes"}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", MEAN_BITS)
def test_weights_and_inputs_have_so_many_bits(runs: Any, name: str, stage: int) -> None:
    metrics, (weights, inputs) = runs[name, stage]["metrics"], MEAN_BITS[name]
    assert metrics["weight_quantization/mean_bits"] == weights
    assert metrics.get("activation_quantization/mean_bits") == inputs


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", MOST_VALUES)
def test_weights_are_on_the_grid(runs: Any, name: str, stage: int) -> None:
    weights = runs[name, stage]["weights"]
    (weight,) = (
        v
        for n, v in weights.items()
        if n.endswith(("layers.1.mlp.up_proj.weight", "layer.1.output.dense.weight"))
    )
    for values in weight.reshape(-1, SHARED_BY.get(name, weight.shape[1]))[:64]:
        assert 1 < len(values.unique()) <= MOST_VALUES[name]
    head = next((value for n, value in weights.items() if "lm_head" in n), None)
    if head is not None:
        assert len(head[0].unique()) > 100, "the output head stays as it is"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["sparse", "sparse_2_4", "all_in_one"])
def test_half_of_the_weights_are_zero(runs: Any, name: str, stage: int) -> None:
    result = runs[name, stage]
    assert result["metrics"]["sparse_pruning/sparsity"] == pytest.approx(0.5, abs=1e-3)
    weight = result["weights"]["bert.encoder.layer.1.intermediate.dense.weight"]
    assert int(weight.count_nonzero()) == weight.numel() // 2
    if name == "sparse_2_4":
        assert int((weight.view(-1, 4) != 0).sum(1).max()) == 2
    assert int((result["weights"]["classifier.weight"] == 0).sum()) == 0, "no numbered layer, so left alone"


@pytest.mark.parametrize("stage", STAGES)
def test_structures_are_gone(runs: Any, stage: int) -> None:
    for name in ("heads_ffn", "all_in_one"):
        weights = runs[name, stage]["weights"]
        assert weights["bert.encoder.layer.0.attention.self.query.weight"].shape == (32, 64)
        assert weights["bert.encoder.layer.0.intermediate.dense.weight"].shape == (96, 64)
        assert {"head_pruning/density", "row_pruning/density"} <= set(runs[name, stage]["metrics"])
    assert runs["depth_kd", stage]["config"]["num_hidden_layers"] == 2
    assert runs["depth_kd", stage]["metrics"]["distillation/hidden"] > 0
    assert runs["experts", stage]["config"]["num_local_experts"] == 2


@pytest.mark.parametrize("stage", STAGES)
def test_teachers_teach(runs: Any, stage: int) -> None:
    taught = {name for name, recipe in newest().items() if "distillation" in recipe.block}
    assert {"nvfp4_qad", "mxfp4", "ternary", "depth_kd", "experts", "all_in_one", "llm"} <= taught
    for name in taught:
        assert runs[name, stage]["metrics"]["distillation/logits"] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_keys_and_values_have_ranges(runs: Any, stage: int) -> None:
    assert runs["llm", stage]["metrics"]["kv_cache/layers_with_range"] == 2


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_train_on_a_packed_base(runs: Any, stage: int) -> None:
    result = runs["lora", stage]
    held = result["latent"]
    assert not any(n.endswith("up_proj.weight") and v.numel() == 256 * 128 for n, v in held.items())
    assert any("lora_B" in n and bool(v.count_nonzero()) for n, v in held.items()), "they begin as zeros"
    (base,) = (v for n, v in result["weights"].items() if n.endswith("layers.1.mlp.up_proj.weight"))
    assert max(len(block.unique()) for block in base.view(-1, 16)[:64]) <= 15


@pytest.mark.parametrize("stage", STAGES)
def test_links_carry_integers(runs: Any, stage: int) -> None:
    metrics = runs["slow_links", stage]["metrics"]
    sent = {name: value for name, value in metrics.items() if name.endswith("quantized_elements")}
    assert {name.partition("/")[0] for name in sent} == {"gradient_reduction", "parameter_compression"}
    assert all(value > 0 for value in sent.values())


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_worker_moves_nothing(runs: Any, stage: int) -> None:
    """Its gradients are a thousand times as long as those of the others, and would be nearly all of a mean."""
    result = runs["bad_workers", stage]
    norms = [result["metrics"][f"gradient_reduction/worker_{rank}_norm"] for rank in range(3)]
    assert norms[BAD_WORKER] > 100 * max(norms[:BAD_WORKER])
    assert 0 < result["grad_norm"] < 2 * max(norms[:BAD_WORKER])


def test_exports_compute_what_was_trained(runs: Any) -> None:
    for name, format in EXPORTED.items():
        found, verdict = runs[name, 2]["export"]
        assert found == format and "differ" in verdict
