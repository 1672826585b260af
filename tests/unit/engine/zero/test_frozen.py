"""Weights that no optimizer steps, in this process; `tests/multirank/test_combinations.py` has them on all stages."""

from __future__ import annotations

import pytest
import torch

import ds_compress
from ds_compress.compat import compression_scheduler, init_compression
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, pruning_block, train

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_weight_left_out_of_the_optimizer_cannot_be_scored_by_gradient(stage: int) -> None:
    model = tiny_bert()
    trained = [p for name, p in model.named_parameters() if "layer.1" not in name]
    with (
        pytest.raises(ds_compress.ConfigError, match=r"layer\.1.*which no optimizer steps"),
        engine_of(model, ds_config(stage, pruning_block("taylor")), model_parameters=trained),
    ):
        pass


def test_a_step_that_is_skipped_leaves_the_new_mask_for_the_next_one() -> None:
    model = tiny_bert()
    model.bert.encoder.layer[1].requires_grad_(False)
    weight = model.bert.encoder.layer[1].intermediate.dense.weight
    with engine_of(model, ds_config(2, pruning_block(density=0.5))) as engine:
        (batch,) = batches(1)
        loss = engine(**batch).loss
        engine.backward(loss * float("nan"))
        engine.step()
        assert int(weight.count_nonzero()) == weight.numel()
        train(engine, batches(1))
        assert int(weight.count_nonzero()) == weight.numel() // 2


def test_frozen_weights_in_a_plain_loop() -> None:
    model = tiny_bert()
    model.bert.encoder.layer[1].requires_grad_(False)
    block = pruning_block(density=0.5)
    init_compression(model, {"compression_training": block})
    scheduler = compression_scheduler(model, {"compression_training": block})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for batch in batches(2):
        model(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
    for layer in model.bert.encoder.layer:
        weight = layer.intermediate.dense.weight
        assert int(weight.count_nonzero()) == weight.numel() // 2
