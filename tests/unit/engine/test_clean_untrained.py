"""`redundancy_clean` where no step was taken: what the block asks for is made of the weights as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.compat import compression_scheduler, init_compression, redundancy_clean
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of

pytestmark = pytest.mark.usefixtures("single_process")


def rows(method: str = "l1", ratio: float = 0.5) -> dict[str, Any]:
    shared = {"enabled": True, "method": method, "schedule_offset": 100, "round_to": 1}
    groups = {
        "ffn": {
            "params": {"dense_ratio": ratio},
            "modules": ["intermediate.dense"],
            "related_modules": [["layer.\\w+.output.dense"]],
        }
    }
    return {"row_pruning": {"shared_parameters": shared, "different_groups": groups}}


def single(**shared: Any) -> dict[str, Any]:
    settings = {"enabled": True, "method": "l1", "schedule_offset": 100, **shared}
    groups = {"all": {"params": {"dense_ratio": 0.25}, "modules": ["attention.self"]}}
    return {"sparse_pruning": {"shared_parameters": settings, "different_groups": groups}}


def heads() -> dict[str, Any]:
    shared = {"enabled": True, "method": "topk", "schedule_offset": 100, "num_heads": 4}
    groups = {"all": {"params": {"dense_ratio": 0.5}, "modules": ["attention.output.dense"]}}
    return {"head_pruning": {"shared_parameters": shared, "different_groups": groups}}


def width(model: nn.Module) -> list[int]:
    return [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer]


def queries(model: nn.Module) -> list[torch.Tensor]:
    return [layer.attention.self.query.weight.detach() for layer in model.bert.encoder.layer]


@pytest.mark.parametrize(
    "how", ["alone", "with a scheduler", "engine", "engine, ZeRO-3", "never initialised"]
)
def test_everything_that_the_block_asks_for_is_removed(how: str) -> None:
    block = {**single(), **rows()}
    config = ds_config(3 if "3" in how else 0, block)
    model, original = tiny_bert(), tiny_bert()
    if how != "never initialised":
        assert init_compression(model, config) is model
    if how == "with a scheduler":
        compression_scheduler(model, config)
    if "engine" in how:
        with engine_of(model, config) as engine:
            cleaned = redundancy_clean(engine, config)
    else:
        cleaned = redundancy_clean(model, config)
    assert cleaned is model
    assert width(cleaned) == [48, 48]
    for weight, before in zip(queries(cleaned), queries(original), strict=True):
        keep = before.abs() >= before.abs().flatten().kthvalue(3 * before.numel() // 4 + 1).values
        assert torch.equal(weight, before * keep)
    layer, before = cleaned.bert.encoder.layer[0], original.bert.encoder.layer[0]
    scores = before.intermediate.dense.weight.abs().sum(1) + before.output.dense.weight.abs().sum(0)
    scores = scores + before.intermediate.dense.bias.abs()
    kept = layer.intermediate.dense.weight
    found = [(before.intermediate.dense.weight == row).all(1).nonzero().item() for row in kept]
    assert found == sorted(found) and len(set(found)) == 48
    batch = next(batches(1))
    assert torch.isfinite(cleaned(**batch).loss)


@pytest.mark.parametrize("method", ["l1", "topk", "taylor", "movement", "snip_momentum", "random"])
def test_whatever_the_method_weights_decide(method: str) -> None:
    extra = {"pattern": "unstructured", "schedule_offset_end": 200} if method == "snip_momentum" else {}
    model = init_compression(tiny_bert(), ds_config(0, single(method=method, **extra)))
    redundancy_clean(model, ds_config(0, single(method=method, **extra)))
    assert [int(weight.count_nonzero()) for weight in queries(model)] == [256, 256]


@pytest.mark.parametrize("pattern", ["2:4", "4x1"])
def test_patterns_hold(pattern: str) -> None:
    block = single(pattern=pattern)
    if pattern == "2:4":
        block["sparse_pruning"]["different_groups"]["all"]["params"] = {}
    model = init_compression(tiny_bert(), ds_config(0, block))
    redundancy_clean(model, ds_config(0, block))
    for weight in queries(model):
        if pattern == "2:4":
            assert bool(((weight.view(-1, 4) != 0).sum(1) == 2).all())
        else:
            blocks = (weight.view(8, 4, 32) != 0).sum(1)
            assert set(blocks.unique().tolist()) == {0, 4} and int(blocks.sum()) == 256


def test_heads_go_too() -> None:
    model = init_compression(tiny_bert(), ds_config(0, heads()))
    redundancy_clean(model, ds_config(0, heads()))
    assert [layer.attention.self.query.out_features for layer in model.bert.encoder.layer] == [16, 16]


def test_a_loaded_state_dict_of_a_masked_model_keeps_what_it_kept() -> None:
    """Training elsewhere zeroed rows that are not the smallest of the model as it was."""
    block = rows()
    trained = tiny_bert()
    with torch.no_grad():
        for layer in trained.bert.encoder.layer:
            layer.intermediate.dense.weight[::2] = 0
            layer.intermediate.dense.bias[::2] = 0
            layer.output.dense.weight[:, ::2] = 0
    batch = next(batches(1))
    expected = trained.eval()(**batch).logits
    model = init_compression(tiny_bert(seed=5), ds_config(0, block))
    model.load_state_dict(copy.deepcopy(trained.state_dict()), strict=False)
    cleaned = redundancy_clean(model, ds_config(0, block)).eval()
    assert width(cleaned) == [48, 48]
    torch.testing.assert_close(cleaned(**batch).logits, expected, rtol=0, atol=1e-5)


def test_a_model_that_was_trained_keeps_the_masks_of_its_training() -> None:
    """Three steps of a schedule that begins later: there is no mask, and none is made behind its back."""
    config = ds_config(0, single(schedule_offset=50))
    with engine_of(tiny_bert(), config) as engine:
        for batch in batches(3):
            engine.backward(engine(**batch).loss)
            engine.step()
        model = ds_compress.finalize(engine)
    assert all(bool((weight != 0).all()) for weight in queries(model))
