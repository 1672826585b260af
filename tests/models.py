"""Tiny random models that many tests use, without dropout, so that two runs agree.

`head` is what follows the family in the name of the class: "ForMaskedLM", "Model", ... Other keyword arguments go to
the config. `seed`: of the weights; None leaves the generator as it is. All architectures: see `tests.zoo.models`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 128
_NO_DROPOUT_OF_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_NO_DROPOUT_OF_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def tiny_bert(
    seed: int | None = 0,
    layers: int = 2,
    hidden: int = 32,
    labels: int = 2,
    heads: int = 4,
    head: str = "ForSequenceClassification",
    **config: Any,
) -> nn.Module:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 3 * hidden,
        "max_position_embeddings": 32,
        "num_labels": labels,
    }
    return _built("Bert", head, seed, {**sizes, **_NO_DROPOUT_OF_BERT, **config})


def tiny_llama(
    seed: int | None = 0,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    key_value_heads: int = 2,
    intermediate: int = 48,
    tied: bool = True,
    head: str = "ForCausalLM",
    **config: Any,
) -> nn.Module:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": 32,
        "tie_word_embeddings": tied,
    }
    return _built("Llama", head, seed, {**sizes, **config})


def tiny_gpt2(
    seed: int | None = 0,
    layers: int = 2,
    hidden: int = 16,
    heads: int = 2,
    head: str = "LMHeadModel",
    **config: Any,
) -> nn.Module:
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": hidden, "n_layer": layers, "n_head": heads}
    return _built("GPT2", head, seed, {**sizes, **_NO_DROPOUT_OF_GPT2, **config})


def _built(family: str, head: str, seed: int | None, config: dict[str, Any]) -> nn.Module:
    if seed is not None:
        torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, family + head)(
        getattr(transformers, f"{family}Config")(**config)
    )
    return model
