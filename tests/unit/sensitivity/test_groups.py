"""Which layers share a format, and which are left alone."""

from __future__ import annotations

import pytest
from torch import nn

from ds_compress.errors import ConfigError
from ds_compress.sensitivity.formats import format_named
from ds_compress.sensitivity.groups import layer_groups, targets_in
from tests.models import tiny_bert, tiny_gpt2, tiny_llama
from tests.zoo.mixtures import mixture


def test_a_llama_has_four_groups_in_a_layer_and_its_head_stays() -> None:
    groups = layer_groups(tiny_llama(tied=False))
    assert [group.name for group in groups[:4]] == [
        "model.layers.0.self_attn.{q_proj,k_proj,v_proj}",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.{gate_proj,up_proj}",
        "model.layers.0.mlp.down_proj",
    ]
    assert len(groups) == 8
    assert groups[0].parameters == 32 * 32 + 2 * 16 * 32
    assert groups[2].modules == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("model", [tiny_bert(), tiny_bert(head="Model"), tiny_gpt2(), tiny_llama(tied=True)])
def test_every_layer_is_in_one_group(model: nn.Module) -> None:
    groups = layer_groups(model)
    names = [name for group in groups for name in group.modules]
    assert (
        len(set(names))
        == len(names)
        == len(set(group.name for group in groups)) + sum(len(group.modules) - 1 for group in groups)
    )
    heads = {"lm_head"}
    layers = {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name not in heads
    }
    assert set(names) == layers


def test_experts_are_groups() -> None:
    model = mixture("mixtral")
    names = [group.name for group in layer_groups(model)]
    assert any(name.endswith("experts.gate_up_proj") for name in names), names
    assert not any("router" in name or name.endswith("gate") for name in names), names


def test_excluded_layers_stay() -> None:
    names = [group.name for group in layer_groups(tiny_llama(), ["down_proj", r"layers\.0\."])]
    assert names == [
        "model.layers.1.self_attn.{q_proj,k_proj,v_proj}",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.{gate_proj,up_proj}",
    ]
    with pytest.raises(ConfigError, match="reaches none"):
        layer_groups(tiny_llama(), ["nothing_like_it"])


def test_a_format_is_left_out_where_a_member_does_not_fit_it() -> None:
    model = tiny_llama(hidden=48, intermediate=72)
    groups = layer_groups(model)
    _, found = targets_in(model, groups, format_named("nvfp4"))
    assert not any("down_proj" in name for name in found)  # 72 is no multiple of 16
    assert len(found) == 6
    _, found = targets_in(model, groups, format_named("int4_g128"))
    assert len(found) == 8, "fewer inputs than a group: one scale for each output"
    _, found = targets_in(model, groups, format_named("int4_g64"))
    assert not any("down_proj" in name for name in found) and len(found) == 6
    shared, found = targets_in(model, groups, format_named("mxfp4"))
    assert shared is None and found == {}


def test_images_have_no_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 64, 1))
    groups = layer_groups(model)
    assert [group.parameters for group in groups] == [32 * 32 * 9, 32 * 64]
    assert targets_in(model, groups, format_named("mxfp4"))[1] == {}
    assert len(targets_in(model, groups, format_named("fp8_e4m3"))[1]) == 2
