"""The hidden size shrinks, exactly or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_compress
from tests.models import tiny_bert, tiny_llama
from tests.multirank.common import batches, ds_config, engine_of, structured_block
from tests.multirank.structured import logits_of

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.mark.parametrize("stage", [0, 3])
def test_the_smaller_model_computes_what_the_masked_one_did(stage: int) -> None:
    with engine_of(tiny_llama(), ds_config(stage, {"hidden_pruning": structured_block()})) as engine:
        for batch in batches(2):
            engine.backward(engine(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss)
            engine.step()
        engine.eval()
        masked = logits_of(engine)
        final: Any = ds_compress.finalize(engine)
    assert final.config.hidden_size == final.model.embed_tokens.embedding_dim == 16
    assert final.model.norm.weight.shape == (16,)
    torch.testing.assert_close(logits_of(final), masked, rtol=1e-5, atol=1e-5)


def test_layer_normalization_is_refused_with_the_reason() -> None:
    with (
        pytest.raises(ds_compress.ConfigError, match="LayerNorm, which subtracts a mean"),
        engine_of(tiny_bert(), ds_config(0, {"hidden_pruning": structured_block()})),
    ):
        pass
