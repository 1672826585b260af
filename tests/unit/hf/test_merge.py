"""LoRA: what a regex reaches, what is refused, and merges of plain models."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import ds_compress
from ds_compress.config.resolve.resolver import resolve
from ds_compress.hf import merge_and_unload
from tests.models import tiny_llama
from tests.multirank.combinations import adapted_llama, block
from tests.multirank.common import ds_config, engine_of
from tests.single import init_single_process

BASE = "base_model.model.model.layers.0.self_attn.q_proj"


def claimed(model: torch.nn.Module, *patterns: str, **shared: Any) -> list[str]:
    plan = resolve(model, block(patterns, quantized=False, **shared))
    return [target.module_name for target in plan.techniques["sparse_pruning"].targets]


@pytest.mark.parametrize("pattern", ["q_proj", r"layers\.\d+\.self_attn\.q_proj.*", "base_layer", "*"])
def test_a_regex_for_a_layer_leaves_its_adapter_out(pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted_llama()
    with caplog.at_level(logging.INFO, logger="ds_compress"):
        names = claimed(model, pattern, excluded_modules=["lm_head"] if pattern == "*" else [])
    assert f"{BASE}.base_layer" in names
    assert not any("lora_" in name for name in names)
    # "base_layer" itself reaches no adapter, so there is nothing to say.
    assert (f"such as {BASE}.lora_A.default" in caplog.text) == (pattern != "base_layer")


def test_a_regex_for_adapters_reaches_them() -> None:
    names = claimed(adapted_llama(), r"q_proj\.lora_A")
    assert names == [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.default" for i in range(2)]


def test_an_adapted_embedding_keeps_its_matrices() -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config)
    names = claimed(model, "embed_tokens", excluded_modules=["lm_head"])
    assert names == ["base_model.model.model.embed_tokens.base_layer"]


def test_scores_that_need_gradients_are_refused_on_a_frozen_base() -> None:
    with pytest.raises(ds_compress.ConfigError, match=r"frozen \(requires_grad is False\)"):
        claimed(adapted_llama(), "q_proj", method="taylor")


def test_an_export_beside_adapters_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ds_compress.ExportError, match="merge_and_unload"):
        ds_compress.export(adapted_llama(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_of_a_sparse_model_is_as_sparse_and_the_stock_one_is_not() -> None:
    def sparse() -> Any:
        model = adapted_llama()
        weight = model.get_submodule(f"{BASE}.base_layer").weight
        weight.data[:, ::2] = 0
        return model

    name = BASE.removeprefix("base_model.model.")
    stock = sparse().merge_and_unload().get_submodule(name).weight
    assert int(stock.count_nonzero()) == stock.numel()
    merged = merge_and_unload(sparse()).get_submodule(name).weight
    assert int(merged.count_nonzero()) == merged.numel() // 2
    torch.testing.assert_close(merged[:, 1::2], stock[:, 1::2])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_merge_from_an_engine_without_a_block(stage: int) -> None:
    """LoRA on a model that was pruned earlier needs no `compression_training` to stay sparse."""
    init_single_process()
    model = adapted_llama()
    model.get_submodule(f"{BASE}.base_layer").weight.data[:, ::2] = 0
    trained = [p for p in model.parameters() if p.requires_grad]
    with engine_of(model, ds_config(stage), model_parameters=trained) as engine:
        merged = merge_and_unload(engine).get_submodule(BASE.removeprefix("base_model.model.")).weight
    assert merged.shape == (32, 32)
    assert int(merged[:, ::2].count_nonzero()) == 0 and int(merged.count_nonzero()) == merged.numel() // 2


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapters"):
        merge_and_unload(tiny_llama())
