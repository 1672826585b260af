"""Feed-forward blocks lose neurons: plain and gated ones, and a Linear that is neither."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_compress
from tests.models import tiny_bert, tiny_llama
from tests.multirank.common import batches, ds_config, engine_of, structured_block, train
from tests.multirank.structured import logits_of

pytestmark = pytest.mark.usefixtures("single_process")


def causal_steps(engine: Any, count: int) -> None:
    for batch in batches(count):
        engine.backward(engine(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss)
        engine.step()


def test_a_plain_block_loses_rows_biases_and_columns() -> None:
    with engine_of(tiny_bert(), ds_config(2, {"row_pruning": structured_block()})) as engine:
        train(engine, batches(2))
        engine.eval()
        masked = logits_of(engine)
        layer = engine.module.bert.encoder.layer[0]
        rows, bias = layer.intermediate.dense.weight, layer.intermediate.dense.bias
        gone = ~rows.any(1)
        assert int(gone.sum()) == 48
        assert not bias[gone].any()
        assert not layer.output.dense.weight[:, gone].any()
        final: Any = ds_compress.finalize(engine)
    assert final.config.intermediate_size == final.bert.encoder.layer[1].output.dense.in_features == 48
    torch.testing.assert_close(logits_of(final), masked, rtol=1e-5, atol=1e-5)


def test_gate_and_up_lose_the_same_rows() -> None:
    with engine_of(tiny_llama(), ds_config(3, {"row_pruning": structured_block()})) as engine:
        causal_steps(engine, 2)
        final: Any = ds_compress.finalize(engine)
    block = final.model.layers[0].mlp
    assert block.gate_proj.out_features == block.up_proj.out_features == block.down_proj.in_features == 24


def test_l1_keeps_the_largest_rows() -> None:
    model = tiny_bert(layers=1)
    dense = model.bert.encoder.layer[0].intermediate.dense
    largest = torch.randperm(96)[:48].sort().values
    with torch.no_grad():
        dense.weight[largest] *= 10
    with engine_of(model, ds_config(0, {"row_pruning": structured_block(method="l1")})) as engine:
        train(engine, batches(1))
        (kept,) = engine.compression.techniques["row_pruning"].kept.values()
    assert torch.equal(kept, largest)


def test_rows_of_another_linear_become_zero_and_stay() -> None:
    shared = {"enabled": True, "schedule_offset": 1}
    groups = {"pooler": {"params": {"dense_ratio": 0.5}, "modules": ["pooler"]}}
    block = {"row_pruning": {"shared_parameters": shared, "different_groups": groups}}
    with engine_of(tiny_bert(), ds_config(0, block)) as engine:
        train(engine, batches(2))
        final: Any = ds_compress.finalize(engine)
    weight = final.bert.pooler.dense.weight
    assert weight.shape == (32, 32)
    assert int((~weight.any(1)).sum()) == 16
