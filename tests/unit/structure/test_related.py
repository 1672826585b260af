"""Structures that the JSON states with `modules` and `related_modules`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.find import find_groups
from ds_compress.structure.prunable_group import GroupKind
from ds_compress.structure.pruning_plan import PruningPlan
from ds_compress.structure.related import mask_only_group, stated_group
from tests.zoo.masked import kept_units, masked_copy
from tests.zoo.models import ZOO, logits_of

_LAYER = "bert.encoder.layer.0"
_SELF = f"{_LAYER}.attention.self"
_OUTPUT = f"{_LAYER}.attention.output.dense"


@pytest.mark.parametrize(
    ("kind", "name", "related", "heads"),
    [
        (GroupKind.ROW, f"{_LAYER}.intermediate.dense", [f"{_LAYER}.output.dense"], None),
        (GroupKind.HEAD, _OUTPUT, [f"{_SELF}.query", f"{_SELF}.key", f"{_SELF}.value"], 4),
    ],
)
def test_stated_is_the_same_as_found(
    kind: GroupKind, name: str, related: list[str], heads: int | None
) -> None:
    model: Any = ZOO["bert"]()
    stated = stated_group(model, kind, [name], related, heads)
    found = find_groups(model, kind).groups[0]
    assert stated.name == name and stated.units == found.units and stated.observed == found.observed
    ours = {(m.tensor, m.dim): m for m in stated.slices}
    theirs = {(m.tensor, m.dim): m for m in found.slices}
    assert ours.keys() == theirs.keys()
    for key, coupled in ours.items():
        assert torch.equal(coupled.index, theirs[key].index) and coupled.scored == theirs[key].scored
    kept = kept_units([stated])
    masked = masked_copy(model, [stated], kept)
    apply_pruning(model, PruningPlan.of([stated], kept))
    torch.testing.assert_close(logits_of(model), logits_of(masked), rtol=0, atol=1e-5)
    if kind is GroupKind.HEAD:
        assert model.get_submodule(_SELF).num_attention_heads == 2


def test_several_writers_share_their_units() -> None:
    mlp = "model.layers.0.mlp"
    model = ZOO["llama"]()
    stated = stated_group(model, GroupKind.ROW, [f"{mlp}.gate_proj", f"{mlp}.up_proj"], [f"{mlp}.down_proj"])
    assert [m.scored for m in stated.slices] == [True, True, False]


def test_a_linear_behind_a_flattened_map() -> None:
    stated = stated_group(ZOO["cnn"](), GroupKind.CHANNEL, ["head"], ["classifier"])
    assert stated.slices[-1].index[1].tolist() == list(range(16, 32))


@pytest.mark.parametrize(
    ("name", "related", "message"),
    [
        (f"{_SELF}.query", "bert.pooler.dense", "there is no module"),
        (f"{_LAYER}.intermediate.dense", f"{_LAYER}.output.LayerNorm", r"has the shape \[32\], not \[64\]"),
        (f"{_LAYER}.intermediate.dense", f"{_LAYER}.output.dropout", "is a Dropout"),
        (f"{_LAYER}.output.LayerNorm", f"{_LAYER}.output.dense", "is a LayerNorm, not a Linear"),
        (f"{_LAYER}.nothing", f"{_LAYER}.output.dense", "is not a module"),
    ],
)
def test_rows_that_do_not_fit(name: str, related: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stated_group(ZOO["bert"](), GroupKind.ROW, [name], [related])


@pytest.mark.parametrize(
    ("heads", "message"), [(None, "say it with num_heads"), (5, "5 heads do not divide")]
)
def test_heads_that_do_not_fit(heads: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stated_group(ZOO["bert"](), GroupKind.HEAD, [_OUTPUT], [f"{_SELF}.query"], heads)


def test_layers_have_no_related_modules() -> None:
    with pytest.raises(ValueError, match="no meaning for layer pruning"):
        stated_group(ZOO["bert"](), GroupKind.LAYER, [_OUTPUT], [])


def test_rows_that_are_only_zeroed() -> None:
    model = ZOO["bert"]()
    group = mask_only_group(model, GroupKind.ROW, _OUTPUT)
    assert not group.removable and group.units == 32
    assert {m.tensor: m.dim for m in group.slices} == {f"{_OUTPUT}.weight": 0, f"{_OUTPUT}.bias": 0}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    apply_pruning(model, PruningPlan.of([group], kept_units([group])))
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes


def test_heads_that_are_only_zeroed() -> None:
    group = mask_only_group(ZOO["bert"](), GroupKind.HEAD, _OUTPUT, num_heads=4)
    (coupled,) = group.slices
    assert (coupled.dim, coupled.scored, coupled.index.shape) == (1, True, (4, 8))
    with pytest.raises(ValueError, match="num_heads"):
        mask_only_group(nn.Sequential(nn.Linear(4, 4)), GroupKind.HEAD, "0")
