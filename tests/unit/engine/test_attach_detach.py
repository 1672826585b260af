"""Whatever we attach to survives: parameters stay the same objects, with their ties, hooks, flags and modes."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

import ds_compress
from tests.models import tiny_bert, tiny_llama
from tests.multirank.common import batches, ds_config, full_weights, pruning_block, train
from tests.multirank.training import quantization_block

pytestmark = pytest.mark.usefixtures("single_process")


def block() -> dict[str, Any]:
    return {**pruning_block(), **quantization_block()}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_everything_a_module_has_survives_attach_and_detach(stage: int) -> None:
    model = tiny_bert()
    model.bert.pooler.requires_grad_(False)
    model.bert.encoder.layer[0].eval()
    calls = []
    query = model.bert.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda *_: calls.append(1))
    parameters = dict(model.named_parameters())
    classes = {name: type(module) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    keys = list(model.state_dict())

    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=ds_config(stage, block()))
    assert type(query) is not nn.Linear
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert list(model.state_dict()) == keys
    train(engine, batches(2))
    assert len(calls) == 2
    frozen = model.bert.pooler.dense.weight
    assert not frozen.requires_grad
    assert all(parameters[name] is p for name, p in model.named_parameters())

    engine.compression.detach()
    assert not hasattr(engine, "compression")
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert "backward" not in vars(engine)
    assert "_take_model_step" not in vars(engine)
    before = full_weights(model)["bert.encoder.layer.0.attention.self.query.weight"]
    train(engine, batches(2))
    after = full_weights(model)["bert.encoder.layer.0.attention.self.query.weight"]
    assert int((before == 0).sum()) > 100
    assert int((after == 0).sum()) < 10, "a detached run trains dense again"
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_tied_weights_stay_tied_and_are_pruned_once(stage: int) -> None:
    model = tiny_llama()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    group = {"params": {"dense_ratio": 0.5}, "modules": ["lm_head"]}
    shared = {"enabled": True, "method": "l1", "schedule_offset": 0}
    sparse = {"sparse_pruning": {"shared_parameters": shared, "different_groups": {"head": group}}}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=ds_config(stage, sparse)
    )
    for batch in batches(2):
        ids = batch["input_ids"] % 64
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weight = full_weights(model)["model.embed_tokens.weight"]
    assert int(weight.count_nonzero()) == weight.numel() // 2
    exported = ds_compress.export_state_dict(engine)
    assert exported["lm_head.weight"] is exported["model.embed_tokens.weight"]
    engine.destroy()


def test_accumulation_counts_steps_not_micro_steps() -> None:
    model = tiny_bert()
    config = ds_config(1, pruning_block(schedule_offset=2), gradient_accumulation_steps=3)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    train(engine, batches(5))
    assert engine.compression.applied_steps == 1
    assert engine.compression.metrics()["sparse_pruning/sparsity"] == 0
    train(engine, batches(1))
    assert engine.compression.applied_steps == 2
    assert engine.compression.metrics()["sparse_pruning/sparsity"] > 0.6
    engine.destroy()


def test_an_optimizer_object_of_the_caller_gets_the_learned_scales() -> None:
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = ds_config(0, quantization_block(weights={"learned_scale": True}))
    del config["optimizer"]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    scales = [p for n, p in model.named_parameters() if n.endswith("weight_step_size")]
    assert len(scales) == 12
    before = [p.detach().clone() for p in scales]
    train(engine, batches(2))
    assert all(not torch.equal(a, b) for a, b in zip(before, scales, strict=True))
    assert not any(key.endswith("weight_step_size") for key in ds_compress.export_state_dict(engine))
    engine.destroy()


def test_a_frozen_weight_asked_to_be_pruned_by_its_gradient_is_an_error() -> None:
    model = tiny_bert()
    model.bert.encoder.layer[1].requires_grad_(False)
    with pytest.raises(ds_compress.ConfigError, match=r"layer\.1"):
        deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=ds_config(0, pruning_block("taylor")),
        )


def test_under_autocast_swapped_layers_reduce_like_plain_ones() -> None:
    dtypes = []
    for block_or_none in (None, quantization_block()):
        model = tiny_bert()
        config = ds_config(1, block_or_none, torch_autocast={"enabled": True, "dtype": "bfloat16"})
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        dtypes.append({name: getattr(p, "comm_dtype", None) for name, p in model.named_parameters()})
        assert train(engine, batches(2))[0] > 0
        engine.destroy()
    assert dtypes[0] == dtypes[1]
    assert torch.bfloat16 in dtypes[0].values()
