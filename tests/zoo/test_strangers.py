"""Architectures that no rule was written for: each cut equals the mask, or is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.find import find_groups
from ds_compress.structure.prunable_group import GroupKind
from ds_compress.structure.pruning_plan import PruningPlan
from tests.zoo.masked import kept_units, masked_copy
from tests.zoo.models import VOCABULARY, logits_of

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GROUPED = {**_BASE, "num_attention_heads": 8, "num_key_value_heads": 4}
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
_SEQUENCES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_IMAGES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 3,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_STRANGERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**_BASE, "embedding_size": 16}, "rh"),
    "bart": ("BartForConditionalGeneration", "BartConfig", _SEQUENCES, "rhl"),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", {**_T5, "num_layers": 3, "num_decoder_layers": 3}, "rhl"),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**_BASE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
        "rhl",
    ),
    "mobilebert": (
        "MobileBertForMaskedLM",
        "MobileBertConfig",
        {**_BASE, "embedding_size": 16, "intra_bottleneck_size": 16},
        "rhl",
    ),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", _BASE, "rl"),
    "longformer": ("LongformerForMaskedLM", "LongformerConfig", {**_BASE, "attention_window": 8}, "rl"),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}, "rhl"),
    "openai": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT, "rl"),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**_GPT, "hidden_size": 32}, "rl"),
    "falcon": ("FalconForCausalLM", "FalconConfig", _BASE, "rl"),
    "persimmon": ("PersimmonForCausalLM", "PersimmonConfig", _BASE, "rhl"),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED, "rhl"),
    "cohere": ("CohereForCausalLM", "CohereConfig", _GROUPED, "rhl"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}, "rhl"),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_GROUPED,
            "head_dim": 8,
            "num_local_experts": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "rhl",
    ),
    "phi3_one_key": ("Phi3ForCausalLM", "Phi3Config", {**_GROUPED, "num_key_value_heads": 1}, "rhl"),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**_BASE, "num_hidden_layers": 3}, "l"),
    "beit": ("BeitForImageClassification", "BeitConfig", {**_IMAGES, "use_relative_position_bias": True}, "rl"),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**_IMAGES, "mlp_ratio": 2}, "rhl"),
    "mobilenet_v2": (
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"num_labels": 3, "image_size": 32, "depth_multiplier": 0.35},
        "c",
    ),
    "segformer": (
        "SegformerForImageClassification",
        "SegformerConfig",
        {
            "num_labels": 3,
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 2],
            "decoder_hidden_size": 16,
        },
        "h",
    ),
}  # fmt: skip
"""Model class, config class, its arguments, and which kinds (r, h, l, c) of structures are found, not refused."""
_LETTERS = {
    "r": GroupKind.ROW,
    "h": GroupKind.HEAD,
    "l": GroupKind.LAYER,
    "c": GroupKind.CHANNEL,
}
_NEVER_THERE = {"mamba": "rh", "mobilenet_v2": "rhl"}
"""Kinds of which the architecture has none that could be refused."""


@pytest.mark.parametrize("name", _STRANGERS)
def test_exact_or_refused(name: str) -> None:
    model, expected_kinds = _model(name), _STRANGERS[name][3]
    before = logits_of(model)
    for letter in "rhc" if "c" in expected_kinds else "rhl":
        found = find_groups(model, _LETTERS[letter])
        assert bool(found.groups) == (letter in expected_kinds)
        if not found.groups:
            assert found.unsupported or letter in _NEVER_THERE[name]
            continue
        kept = kept_units(found.groups)
        masked, cut = masked_copy(model, found.groups, kept), copy.deepcopy(model)
        apply_pruning(cut, PruningPlan.of(found.groups, kept))
        expected = logits_of(masked)
        assert (expected - before).abs().max() > 1e-3
        torch.testing.assert_close(logits_of(cut), expected, rtol=1e-5, atol=2e-5)


def _model(name: str) -> nn.Module:
    cls, config, arguments, _ = _STRANGERS[name]
    if "image_size" not in arguments and "depths" not in arguments:
        arguments = {**arguments, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model: nn.Module = getattr(hf, cls)(getattr(hf, config)(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
            else:
                fan_in = parameter[0].numel() if parameter.dim() == 4 else 16
                parameter.normal_(0.0, 0.8 * fan_in**-0.5)
    return model
