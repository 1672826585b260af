"""Prunable groups of experts: what belongs to each, found from shapes alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.find import find_groups
from ds_compress.structure.prunable_group import GroupKind
from ds_compress.structure.pruning_plan import PruningPlan
from tests.zoo.mixtures import ARCHITECTURES, StrangeMixture, mixture


def local(model: nn.Module, index: int = -1) -> dict[str, int]:
    """{tensor of the last mixture's group, without the block's name: dimension}."""
    group = find_groups(model, GroupKind.EXPERT).groups[index]
    block = group.modules[0]
    return {part.tensor.removeprefix(f"{block}."): part.dim for part in group.slices}


FUSED = {"experts.gate_up_proj": 0, "experts.down_proj": 0}


@pytest.mark.parametrize("name", [*ARCHITECTURES, "stranger"])
def test_all_that_has_an_entry_per_expert(name: str) -> None:
    router = {
        "granite_moe": {"router.weight": 0},
        "phi_moe": {"router.weight": 0},
        "jamba": {"router.weight": 0},
        "llama4": {"router.weight": 0},
        "gpt_oss": {
            "router.weight": 0,
            "router.bias": 0,
            "experts.gate_up_proj_bias": 0,
            "experts.down_proj_bias": 0,
        },
        "hunyuan_moe": {"gate.wg.weight": 0},
        "ernie_moe": {"gate.weight": 0, "gate.moe_statics.e_score_correction_bias": 1},
        "deepseek_v3": {"gate.weight": 0, "gate.e_score_correction_bias": 0},
        "glm4_moe": {"gate.weight": 0, "gate.e_score_correction_bias": 0},
        "dots1": {"gate.weight": 0, "gate.e_score_correction_bias": 0},
        "stranger": {"chooser.weight": 0, "chooser.bias": 0},
    }.get(name, {"gate.weight": 0})
    fused = {} if name == "stranger" else FUSED
    assert local(mixture(name)) == {**fused, **router}


def test_shared_experts_stay_whatever_their_sizes() -> None:
    """A shared expert with as many neurons as there are experts, a hidden size of that number, too."""
    model = mixture("qwen2_moe", shared_expert_intermediate_size=16, num_experts=16)
    assert local(model) == {**FUSED, "gate.weight": 0}


def test_a_correction_bias_that_does_not_train_is_not_zeroed() -> None:
    (group,) = find_groups(mixture("ernie_moe"), GroupKind.EXPERT).groups
    assert [part.masked for part in group.slices] == [True, True, True, False]


def test_dense_layers_are_no_group() -> None:
    groups = find_groups(mixture("deepseek_v3"), GroupKind.EXPERT).groups
    assert [group.modules[0] for group in groups] == ["model.layers.1.mlp"]


@pytest.mark.parametrize(
    ("name", "parts", "fewest"),
    [
        ("mixtral", 1, 2),
        ("llama4", 1, 1),
        ("deepseek_v2", 2, 4),
        ("deepseek_v3", 2, 4),
        ("hunyuan_moe", 1, 2),
    ],
)
def test_how_many_a_router_needs(name: str, parts: int, fewest: int) -> None:
    group = find_groups(mixture(name), GroupKind.EXPERT).groups[-1]
    assert (group.parts, group.fewest) == (parts, fewest)


def test_two_of_each_group_of_a_router_with_a_correction_bias() -> None:
    """It scores a group by its two best, even if it takes one expert of each."""
    model = mixture("deepseek_v3", topk_group=2)
    assert find_groups(model, GroupKind.EXPERT).groups[0].fewest == 4
    assert find_groups(mixture("deepseek_v2", topk_group=2), GroupKind.EXPERT).groups[0].fewest == 2


def test_experts_of_a_list_are_renumbered_in_layers_that_are() -> None:
    model: Any = StrangeMixture()
    layers = find_groups(model, GroupKind.LAYER, stack="blocks").groups
    experts = find_groups(model, GroupKind.EXPERT).groups
    kept = {"blocks": [1], "blocks.0:experts": [0, 2], "blocks.1:experts": [1, 3]}
    plan = PruningPlan.of([*layers, *experts], {name: torch.tensor(units) for name, units in kept.items()})
    assert plan.renamed("blocks.1.parts.3.wide.weight") == "blocks.0.parts.1.wide.weight"
    assert plan.renamed("blocks.1.parts.0.wide.weight") is None
    assert plan.renamed("blocks.0.parts.0.wide.weight") is None
    assert plan.renamed("blocks.1.chooser.bias") == "blocks.0.chooser.bias"
    before = copy.deepcopy(model)
    apply_pruning(model, plan)
    assert torch.equal(model.blocks[0].parts[1].wide.weight, before.blocks[1].parts[3].wide.weight)
    assert torch.equal(model.blocks[0].chooser.weight, before.blocks[1].chooser.weight[[1, 3]])
    assert len(model.blocks) == 1 and len(model.blocks[0].parts) == 2
