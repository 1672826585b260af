"""The attention modules of a model that keep keys and values while it generates."""

from __future__ import annotations

from torch import nn


def decoder_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """By name, the causal attentions of a model of transformers: those that know their place in a cache."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "is_causal", False) is True and getattr(module, "layer_idx", None) is not None
    }
