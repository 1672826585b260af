"""Attention scores of models whose attention kernels do not return them.

Query and key are taken before the kernel (`modelinfo.attention_kernels`); scores are computed from them only where they
are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_compress.errors import ConfigError, Problem
from ds_compress.modelinfo.attention_kernels import (
    Handle,
    KernelInputs,
    add_hook,
    can_open,
    close_kernels,
    open_kernels,
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


class _Handles:
    def __init__(self, handles: list[Handle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def subscribe_scores(layer: nn.Module, receive: Callable[[AttentionScores], None]) -> _Handles:
    """Every attention module in `layer` calls `receive` with its scores, once `expose_scores` prepared its model."""

    def hook(given: KernelInputs) -> None:
        is_causal = bool(getattr(given.module, "is_causal", False))
        receive(AttentionScores(given.query, given.key, given.scaling, is_causal))

    return _Handles([add_hook(module, hook) for module in layer.modules()])


def expose_scores(model: Any) -> None:
    """Makes the attention of `model` pass its scores to their subscribers.

    Raises:
        ConfigError: the model is not one of transformers with exchangeable attention kernels.
    """
    if not can_open(model):
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
    open_kernels(model)


def hide_scores(model: Any) -> None:
    """Restores the kernel of `model`."""
    if model is not None:
        close_kernels(model)
