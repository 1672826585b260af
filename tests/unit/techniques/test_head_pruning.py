"""Attention layers lose heads; under grouped-query attention, groups of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_compress
from tests.models import tiny_bert, tiny_llama
from tests.multirank.common import batches, ds_config, engine_of, structured_block, train
from tests.multirank.structured import logits_of

pytestmark = pytest.mark.usefixtures("single_process")


def test_a_head_is_rows_of_three_matrices_and_columns_of_one() -> None:
    with engine_of(tiny_bert(), ds_config(2, {"head_pruning": structured_block(method="l1")})) as engine:
        train(engine, batches(2))
        engine.eval()
        masked = logits_of(engine)
        attention = engine.module.bert.encoder.layer[0].attention
        heads = attention.output.dense.weight.view(32, 4, 8).any(2).any(0)
        assert int(heads.sum()) == 2
        for projection in (attention.self.query, attention.self.key, attention.self.value):
            assert torch.equal(projection.weight.view(4, 8, 32).any(2).any(1), heads)
        final: Any = ds_compress.finalize(engine)
    assert final.bert.encoder.layer[0].attention.self.query.out_features == 16
    torch.testing.assert_close(logits_of(final), masked, rtol=1e-5, atol=1e-5)


def test_a_key_value_head_takes_its_query_heads_along() -> None:
    block = {"head_pruning": structured_block(method="l1")}
    with engine_of(tiny_llama(), ds_config(3, block)) as engine:
        for batch in batches(2):
            engine.backward(engine(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss)
            engine.step()
        final: Any = ds_compress.finalize(engine)
    attention = final.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (16, 8)
    assert (final.config.num_attention_heads, final.config.num_key_value_heads) == (2, 1)


def test_the_method_is_learned_unless_the_json_says_otherwise() -> None:
    with engine_of(tiny_bert(), ds_config(0, {"head_pruning": structured_block()})) as engine:
        assert engine.compression.config.head_pruning.shared_parameters.method == "topk"
