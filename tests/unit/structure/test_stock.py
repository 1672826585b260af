"""Why stock transformers would not rebuild a cut model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from ds_compress.structure.find import find_structures
from ds_compress.structure.prunable_group import GroupKind
from ds_compress.structure.pruning_plan import PruningPlan
from ds_compress.structure.vanilla_hf import stock_obstacles
from tests.zoo.masked import kept_units
from tests.zoo.models import ZOO


def _cuts(model: Any, kind: GroupKind, fraction: float = 0.5) -> PruningPlan:
    structures = find_structures(model, kind).structures
    return PruningPlan.of(structures, kept_units(structures, fraction))


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "gpt2", "opt", "gpt_neox", "whisper"])
def test_another_size_of_heads_is_noticed(name: str) -> None:
    """In these, fewer heads in the config mean wider ones."""
    model = ZOO[name]()
    obstacles = stock_obstacles(model, _cuts(model, GroupKind.HEAD))
    assert obstacles and "that its config builds" in obstacles[0]
    assert not stock_obstacles(model, _cuts(model, GroupKind.ROW))


def test_wider_heads_of_the_same_shapes_are_noticed() -> None:
    """The silent case: every shape agrees, and the numbers inside do not."""
    config = hf.BertConfig(vocab_size=61, hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    model: Any = hf.BertModel(config)
    model.config.num_attention_heads = 2
    obstacles = stock_obstacles(model)
    assert any("attention.self.attention_head_size is 8, and 16" in text for text in obstacles)


def test_a_hidden_size_that_heads_do_not_divide() -> None:
    model = ZOO["llama"]()
    obstacles = stock_obstacles(model, _cuts(model, GroupKind.HEAD, 0.75))
    assert len(obstacles) == 1
    assert (
        "LlamaForCausalLM refuses the config" in obstacles[0]
        and "multiple of the number of attention heads" in obstacles[0]
    )


def test_layers_that_differ() -> None:
    model = ZOO["llama"]()
    structures = find_structures(model, GroupKind.ROW).structures
    kept = {structure.name: torch.arange(8 * (position + 1)) for position, structure in enumerate(structures)}
    obstacles = stock_obstacles(model, PruningPlan.of(structures, kept))
    assert "model.layers.0.mlp.gate_proj.weight is [8, 32], and [48, 32]" in obstacles[0]
    assert len(obstacles) == 9 and obstacles[-1].startswith("and ")


def test_scales_by_the_number_of_a_layer() -> None:
    config = hf.GPT2Config(
        vocab_size=61, n_embd=32, n_head=4, n_layer=4, scale_attn_by_inverse_layer_idx=True
    )
    model = hf.GPT2LMHeadModel(config)
    structures = find_structures(model, GroupKind.LAYER).structures
    obstacles = stock_obstacles(model, PruningPlan.of(structures, {"transformer.h": torch.tensor([0, 3])}))
    assert any("transformer.h.1.attn.scaling" in text for text in obstacles)


def test_nothing_cut_and_nothing_to_load() -> None:
    model = ZOO["bert"]()
    assert not stock_obstacles(model, PruningPlan.of(find_structures(model, GroupKind.ROW).structures, {}))
    assert not stock_obstacles(model)
    assert "has no config" in stock_obstacles(ZOO["cnn"]())[0]


def test_a_config_stands_for_its_model() -> None:
    model: Any = ZOO["bert"]()
    cuts = _cuts(model, GroupKind.HEAD)
    assert "architectures" in stock_obstacles(hf.BertConfig(), cuts)[0]
    model.config.architectures = ["BertForMaskedLM"]
    assert stock_obstacles(model.config, cuts) == stock_obstacles(model, cuts)


def test_the_model_is_left_alone() -> None:
    model: Any = ZOO["llama"]()
    before = model.config.to_dict()
    stock_obstacles(model, _cuts(model, GroupKind.ROW))
    assert model.config.to_dict() == before and model.lm_head.weight.shape == (61, 32)


def test_a_model_that_its_config_has_long_ceased_to_describe() -> None:
    model: Any = ZOO["llama"]()
    structures = find_structures(model, GroupKind.ROW).structures[:1]
    PruningPlan.of(structures, kept_units(structures)).rewrite(model)
    obstacles = stock_obstacles(model, _cuts(model, GroupKind.HEAD))
    assert "model.layers.0.mlp.gate_proj.weight is [24, 32], and [48, 32]" in obstacles[0]


def test_quantizers_are_no_obstacles() -> None:
    class Quantized(torch.nn.Linear):
        _ds_compress_base_class = torch.nn.Linear

    model: Any = ZOO["llama"]()
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Quantized
            module.weight_step_size = torch.nn.Parameter(torch.ones(1))
    assert not stock_obstacles(model)
    cuts = _cuts(model, GroupKind.ROW)
    assert not stock_obstacles(model, cuts)
    cuts.rewrite(model)
    assert not stock_obstacles(model)
    assert model.model.layers[0].mlp.up_proj.out_features == 24
