"""Tiny random models of every architecture that the zoo tests go through, built without a hub.

All are in eval mode, in fp32, of 4 layers (2 in ResNet's stages), with random biases and normalization weights: fresh
models have zeros and ones there, which would hide a cut that takes the wrong entries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 61
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE_HEADS = {**_LLAMA, "head_dim": 8}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class ResidualCNN(nn.Module):
    """Two residual blocks, the second with a projection; a Linear reads the flattened maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.first = ResidualBlock(16, 16)
        self.second = ResidualBlock(16, 24, stride=2)
        self.head = nn.Conv2d(24, 16, 1)
        self.classifier = nn.Linear(16 * 4 * 4, 5)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        return {"x": torch.rand(2, 3, 8, 8)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(torch.relu(self.stem_norm(self.stem(x)))))
        logits: torch.Tensor = self.classifier(torch.relu(self.head(x)).flatten(1))
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside an identity or a 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        project = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if project else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_heads=4,
        num_layers=4,
        num_decoder_layers=4,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config)


def _t5_gated() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=4,
        num_decoder_layers=4,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return hf.T5ForConditionalGeneration(config)


def _whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=20,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return hf.WhisperForConditionalGeneration(config)


def _vit() -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return hf.ViTForImageClassification(config)


def _resnet() -> nn.Module:
    config = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], layer_type="basic", num_labels=3
    )
    return hf.ResNetForImageClassification(config)


def _modernbert() -> nn.Module:
    config = hf.ModernBertConfig(
        **{**_BERT, "intermediate_size": 48},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        global_attn_every_n_layers=2,
        local_attention=8,
    )
    return hf.ModernBertForMaskedLM(config)


def _gemma3() -> nn.Module:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_WIDE_HEADS, sliding_window=8, layer_types=types))


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)),
    "bert_classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_BERT)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_BERT)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=32,
            hidden_dim=64,
            n_layers=4,
            n_heads=4,
            max_position_embeddings=40,
            num_labels=3,
        )
    ),
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**_BERT, embedding_size=16)),
    "modernbert": _modernbert,
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=40,
            pad_token_id=1,
        )
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_BERT, tie_word_embeddings=False)),
    "t5": _t5,
    "t5_gated": _t5_gated,
    "vit": _vit,
    "whisper": _whisper,
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "llama_untied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_WIDE_HEADS)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_LLAMA, tie_word_embeddings=True)),
    # As for olmo2 below: one epsilon for norms over the hidden entries and over those of a head.
    "qwen3": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**_WIDE_HEADS, tie_word_embeddings=True, rms_norm_eps=1e-9)
    ),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_WIDE_HEADS)),
    "gemma3": _gemma3,
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**{**_LLAMA, "num_key_value_heads": 8})),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_LLAMA)),
    # Its normalizations over all heads see fewer heads after a cut, where an epsilon weighs a little more.
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_LLAMA, rms_norm_eps=1e-9)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**_LLAMA)),
    "glm": lambda: hf.GlmForCausalLM(hf.GlmConfig(**_WIDE_HEADS, attention_bias=True)),
    "granite": lambda: hf.GraniteForCausalLM(
        hf.GraniteConfig(
            **_LLAMA,
            tie_word_embeddings=True,
            embedding_multiplier=1.5,
            attention_multiplier=0.3,
            residual_multiplier=0.7,
            logits_scaling=2.0,
        )
    ),
    "resnet": _resnet,
    "cnn": ResidualCNN,
}


def _randomized(name: str) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = _BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
            else:
                # Fresh attention weights are near 0, and so would be the difference that a wrong cut makes.
                fan_in = parameter[0].numel() if parameter.dim() > 2 else 16
                parameter.normal_(0.0, 0.8 * fan_in**-0.5, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0.0, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


def _builder(name: str) -> Callable[[], nn.Module]:
    return lambda: _randomized(name)


ZOO: dict[str, Callable[[], nn.Module]] = {name: _builder(name) for name in _BUILDERS}
"""Name of the architecture -> a function that builds it; the same weights at each call."""


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Random inputs for `model(**inputs)`: 2 sequences of 12 tokens, the last 3 of the second one masked."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    parameters: Any = inspect.signature(model.forward).parameters
    if "x" in parameters:
        return {"x": torch.randn(2, 3, 8, 8, generator=generator).to(dtype)}
    if "pixel_values" in parameters:
        size = getattr(model.config, "image_size", 32)
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator).to(dtype)}
    tokens = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
    if "input_features" in parameters:
        features = torch.randn(2, 8, 40, generator=generator).to(dtype)
        return {"input_features": features, "decoder_input_ids": tokens}
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, -3:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = tokens[:, :7]
    return inputs


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    """Logits for `inputs_of(model)`, without a key-value cache."""
    inputs: dict[str, Any] = dict(inputs_of(model))
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    output = model(**inputs)
    logits: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return logits
