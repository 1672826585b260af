"""Why stock transformers would not rebuild a cut model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.find import find_groups
from ds_compress.structure.prunable_group import GroupKind
from ds_compress.structure.pruning_plan import PruningPlan
from ds_compress.structure.vanilla_hf import vanilla_hf_obstacles
from tests.zoo.masked import kept_units
from tests.zoo.models import ZOO


def _pruning_plan(model: Any, kind: GroupKind, fraction: float = 0.5) -> PruningPlan:
    groups = find_groups(model, kind).groups
    return PruningPlan.of(groups, kept_units(groups, fraction))


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "gpt2", "opt", "gpt_neox", "whisper"])
def test_another_size_of_heads_is_noticed(name: str) -> None:
    """In these, fewer heads in the config mean wider ones."""
    model = ZOO[name]()
    obstacles = vanilla_hf_obstacles(model, _pruning_plan(model, GroupKind.HEAD))
    assert obstacles and "that its config builds" in obstacles[0]
    assert not vanilla_hf_obstacles(model, _pruning_plan(model, GroupKind.ROW))


def test_wider_heads_of_the_same_shapes_are_noticed() -> None:
    """The silent case: every shape agrees, and the numbers inside do not."""
    config = hf.BertConfig(vocab_size=61, hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    model: Any = hf.BertModel(config)
    model.config.num_attention_heads = 2
    obstacles = vanilla_hf_obstacles(model)
    assert any("attention.self.attention_head_size is 8, and 16" in text for text in obstacles)


def test_a_hidden_size_that_heads_do_not_divide() -> None:
    model = ZOO["llama"]()
    obstacles = vanilla_hf_obstacles(model, _pruning_plan(model, GroupKind.HEAD, 0.75))
    assert len(obstacles) == 1
    assert (
        "LlamaForCausalLM refuses the config" in obstacles[0]
        and "multiple of the number of attention heads" in obstacles[0]
    )


def test_layers_that_differ() -> None:
    model = ZOO["llama"]()
    groups = find_groups(model, GroupKind.ROW).groups
    kept = {group.name: torch.arange(8 * (position + 1)) for position, group in enumerate(groups)}
    obstacles = vanilla_hf_obstacles(model, PruningPlan.of(groups, kept))
    assert "model.layers.0.mlp.gate_proj.weight is [8, 32], and [48, 32]" in obstacles[0]
    assert len(obstacles) == 9 and obstacles[-1].startswith("and ")


def test_scales_by_the_number_of_a_layer() -> None:
    config = hf.GPT2Config(
        vocab_size=61, n_embd=32, n_head=4, n_layer=4, scale_attn_by_inverse_layer_idx=True
    )
    model = hf.GPT2LMHeadModel(config)
    groups = find_groups(model, GroupKind.LAYER).groups
    obstacles = vanilla_hf_obstacles(model, PruningPlan.of(groups, {"transformer.h": torch.tensor([0, 3])}))
    assert any("transformer.h.1.attn.scaling" in text for text in obstacles)


def test_nothing_cut_and_nothing_to_load() -> None:
    model = ZOO["bert"]()
    assert not vanilla_hf_obstacles(model, PruningPlan.of(find_groups(model, GroupKind.ROW).groups, {}))
    assert not vanilla_hf_obstacles(model)
    assert "has no config" in vanilla_hf_obstacles(ZOO["cnn"]())[0]


def test_a_config_stands_for_its_model() -> None:
    model: Any = ZOO["bert"]()
    pruning_plan = _pruning_plan(model, GroupKind.HEAD)
    assert "architectures" in vanilla_hf_obstacles(hf.BertConfig(), pruning_plan)[0]
    model.config.architectures = ["BertForMaskedLM"]
    assert vanilla_hf_obstacles(model.config, pruning_plan) == vanilla_hf_obstacles(model, pruning_plan)


def test_the_model_is_left_alone() -> None:
    model: Any = ZOO["llama"]()
    before = model.config.to_dict()
    vanilla_hf_obstacles(model, _pruning_plan(model, GroupKind.ROW))
    assert model.config.to_dict() == before and model.lm_head.weight.shape == (61, 32)


def test_a_model_that_its_config_has_long_ceased_to_describe() -> None:
    model: Any = ZOO["llama"]()
    groups = find_groups(model, GroupKind.ROW).groups[:1]
    apply_pruning(model, PruningPlan.of(groups, kept_units(groups)))
    obstacles = vanilla_hf_obstacles(model, _pruning_plan(model, GroupKind.HEAD))
    assert "model.layers.0.mlp.gate_proj.weight is [24, 32], and [48, 32]" in obstacles[0]


def test_quantizers_are_no_obstacles() -> None:
    class Quantized(torch.nn.Linear):
        _ds_compress_base_class = torch.nn.Linear

    model: Any = ZOO["llama"]()
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Quantized
            module.weight_step_size = torch.nn.Parameter(torch.ones(1))
    assert not vanilla_hf_obstacles(model)
    pruning_plan = _pruning_plan(model, GroupKind.ROW)
    assert not vanilla_hf_obstacles(model, pruning_plan)
    apply_pruning(model, pruning_plan)
    assert not vanilla_hf_obstacles(model)
    assert model.model.layers[0].mlp.up_proj.out_features == 24
