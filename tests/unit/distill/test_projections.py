"""Query, key and value projections are found by what a family calls them."""

from __future__ import annotations

import pytest
from torch import nn

import ds_compress
from ds_compress.distill.projections import find_projections


def test_projections_are_found_by_family() -> None:
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    bert = transformers.BertModel(transformers.BertConfig(**small, vocab_size=9)).encoder.layer[0]
    assert find_projections(bert)[0] is bert.attention.self.query
    llama = transformers.LlamaModel(
        transformers.LlamaConfig(**small, num_key_value_heads=1, vocab_size=9)
    ).layers[0]
    assert find_projections(llama)[2] is llama.self_attn.v_proj
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9)).h[0]
    assert find_projections(gpt2) == [gpt2.attn.c_attn]
    with pytest.raises(ds_compress.ConfigError, match="Sequential"):
        find_projections(nn.Sequential(nn.Linear(2, 2)))
