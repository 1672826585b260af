"""Attention of a served model by this library's kernel, where that is faster than torch's.

`scaled_dot_product_attention` of torch is made for long sequences: of an encoder with 40 tokens and integer products it
is a third of the time. transformers looks attention up by name, so a model is given the name of a function that takes
the kernel where it pays, and torch where it does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ds_compress.export.fuse import FusedPart
from ds_compress.export.serve import Int8Linear
from ds_compress.export.serve_weight_only import WeightOnlyLinear
from ds_compress.modelinfo.attention_kernels import can_open
from ds_compress.ops import kernels
from ds_compress.ops.instructions import has_avx512

NAME = "ds_compress_served"
_ON_KERNELS = (Int8Linear, FusedPart, WeightOnlyLinear)
_REPLACED = "sdpa"
_MOST_KEYS = 1024
_MOST_KEYS_IN_HALVES = 48  # beyond it torch is faster with tiles of bf16, where the CPU has them
_FEWEST_QUERIES = 5  # decoding: fewer are no product of matrices
_UNKNOWN = ("position_bias", "softcap", "s_aux", "output_attentions")


def use_served_attention(model: nn.Module) -> None:
    """In place, for a model of transformers whose attention is torch's; with vectors of 32 bytes nothing is won.

    One without a layer that multiplies on a kernel is as slow as its floats, and keeps their bits instead.
    """
    if (
        has_avx512()
        and any(isinstance(m, _ON_KERNELS) for m in model.modules())
        and can_open(model)
        and _is_torchs(model.config)
    ):
        _register()
        model.set_attn_implementation(NAME)  # type: ignore[operator]


def _is_torchs(config: Any) -> bool:
    """Of each part of the model: one that chose another attention had a reason."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return all(
        getattr(each, "_attn_implementation", None) == _REPLACED
        for each in [config, *parts]
        if each is not None
    )


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, served_attention)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()[_REPLACED])


def served_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As `transformers.integrations.sdpa_attention.sdpa_attention_forward`: (batch, tokens, heads, width), None."""
    is_known = dropout == 0 and not any(_is_set(others.get(name)) for name in _UNKNOWN)
    if not is_known or not _pays(query, key, value, attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        y, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return y, None
    mask = attention_mask
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.float()
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    y = kernels().attention(query, key, value, mask, scale=scale, is_causal=bool(causal) and mask is None)
    return y, None


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def _pays(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Also whether the kernel takes them: on the CPU, without gradients, and a mask of all keys."""
    tensors = (query, key, value)
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if any(t.dim() != 4 or t.dtype is not query.dtype or len(t) != len(query) for t in tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    keys = key.shape[2]
    if mask is not None and (mask.dim() != 4 or mask.shape[3] != keys or mask.requires_grad):
        return False
    most = _MOST_KEYS if query.dtype is torch.float32 else _MOST_KEYS_IN_HALVES
    return query.shape[2] >= _FEWEST_QUERIES and keys <= most
