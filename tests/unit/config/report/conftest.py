"""Models whose plans are looked at."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=6,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=40,
            max_position_embeddings=8,
        )
    )


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)
