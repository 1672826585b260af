"""Small models whose widths every block divides, and the quantizers of a scheme on them as a training leaves them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import nn

from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.quant import layers
from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.grid import ActivationGrid, WeightGrid
from ds_compress.quant.quantizers import InputQuantizer, WeightQuantizer
from ds_compress.quant.schemes import QuantizerSpec, scheme_named

_TEXT = {
    "vocab_size": 61,
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
}
_DECODER = {**_TEXT, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**{**_DECODER, "num_hidden_layers": 2}, tie_word_embeddings=False)
    ),
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, head_dim=32)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **_DECODER, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
        )
    ),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_TEXT, num_labels=3)),
}
BODY = ("self_attn.", "mlp.", "encoder.layer.")


def model_of(name: str, seed: int = 0) -> nn.Module:
    """In eval mode; weights with the outliers of a trained model, biases and norms that are not 0 and 1."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.randn_like(parameter).abs())
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 27).view(2, 12)}


def weight_grid(spec: QuantizerSpec) -> WeightGrid:
    return WeightGrid(
        bits=spec.bits,
        narrow_range=spec.format == "int",
        format=spec.format,
        granularity=spec.granularity,
        group_size=spec.group_size or 128,
    )


def input_grid(spec: QuantizerSpec) -> ActivationGrid:
    return ActivationGrid(
        bits=spec.bits,
        narrow_range=spec.format == "int",
        format=spec.format,
        granularity=spec.granularity,
        static=spec.static,
        group_size=spec.group_size or 128,
    )


def quantized_to(model: nn.Module, scheme: str, modules: tuple[str, ...] = BODY) -> nn.Module:
    """Linear layers whose names have one of `modules` in them; static ranges are those of one forward."""
    known = scheme_named(scheme)
    found = []
    for name, module in model.named_modules():
        if kind_of(module) is not ModuleKind.LINEAR or not any(part in name for part in modules):
            continue
        layer = layers.attach(module)
        found.append(layer)
        if known.weights is not None:
            layer.weight_quantizer = WeightQuantizer(FakeQuantConfig(weight_grid(known.weights)))
        if known.inputs is not None:
            layer.input_quantizer = InputQuantizer(input_grid(known.inputs), enabled=True)
    if known.inputs is not None and known.inputs.static:
        with torch.no_grad():
            model.train()(**tokens())
        model.eval()
        for layer in found:
            assert layer.input_quantizer.observed is not None
            layer.input_quantizer.input_range = layer.input_quantizer.observed * torch.tensor([-1.0, 1.0])
    return model
