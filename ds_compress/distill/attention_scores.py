"""Attention scores of models whose attention kernels do not return them.

transformers looks attention kernels up by name. For models whose scores are needed, the name is changed to that of a
wrapper, which passes query and key to us before it calls the model's kernel. Scores are computed from them only where
they are compared, so rotary embeddings, grouped queries and any kernel are supported.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_compress.errors import ConfigError, Problem

_PREFIX = "ds_compress_shows_scores_of_"
_receivers: weakref.WeakKeyDictionary[nn.Module, Callable[[AttentionScores], None]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class AttentionScores:
    """query: (batch, heads, tokens, width of a head), rotated if the model does. key: likewise, perhaps fewer heads."""

    query: torch.Tensor
    key: torch.Tensor
    scaling: float
    is_causal: bool

    def scores(self) -> torch.Tensor:
        """fp32 (batch, heads, tokens, tokens), before any mask and softmax."""
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        return self.query.float() @ key.float().transpose(2, 3) * self.scaling


class _Handle:
    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules

    def remove(self) -> None:
        for module in self._modules:
            _receivers.pop(module, None)


def subscribe_scores(layer: nn.Module, receive: Callable[[AttentionScores], None]) -> _Handle:
    """Every attention module in `layer` calls `receive` with its scores, once `expose_scores` prepared its model."""
    modules = list(layer.modules())
    for module in modules:
        _receivers[module] = receive
    return _Handle(modules)


def expose_scores(model: Any) -> None:
    """Makes the attention of `model` pass its scores to their subscribers; idempotent.

    Raises:
        ConfigError: the model is not one of transformers with exchangeable attention kernels.
    """
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if name is None or not hasattr(model, "set_attn_implementation"):
        raise ConfigError(
            [
                Problem(
                    "compression_training.distillation.losses.attention.kind",
                    f'"maps" with a {type(model).__name__}',
                    "a model of transformers whose attention kernel can be chosen",
                    'use "kind": "relation"',
                )
            ]
        )
    if not name.startswith(_PREFIX):
        model.set_attn_implementation(_registered(name))


def hide_scores(model: Any) -> None:
    """Restores the name of the kernel of `model`."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    if name.startswith(_PREFIX):
        model.set_attn_implementation(name.removeprefix(_PREFIX))


def _registered(name: str) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface

    kernels, masks = AttentionInterface(), AttentionMaskInterface()
    # "eager" is no kernel of the library: each model's file defines one, with its own soft caps and sinks.
    kernel = kernels[name] if name in kernels.valid_keys() else None
    AttentionInterface.register(_PREFIX + name, _passing_on(kernel))
    if name in masks.valid_keys():
        AttentionMaskInterface.register(_PREFIX + name, masks[name])
    return _PREFIX + name


def _passing_on(kernel: Callable[..., Any] | None) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        receive = _receivers.get(module)
        if receive is not None:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            receive(AttentionScores(query, key, scaling, bool(getattr(module, "is_causal", False))))
        return (kernel or _eager_kernel(type(module)))(module, query, key, value, *args, **kwargs)

    return attention


def _eager_kernel(of: type[nn.Module]) -> Callable[..., Any]:
    from transformers import AttentionInterface

    files = (vars(sys.modules[base.__module__]) for base in of.__mro__)
    found = (file["eager_attention_forward"] for file in files if "eager_attention_forward" in file)
    kernel: Callable[..., Any] = next(found, AttentionInterface()["sdpa"])
    return kernel
