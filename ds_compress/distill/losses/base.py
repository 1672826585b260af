"""The base of distillation losses. A new one is a subclass in a file here, and its keys in `schema/distillation.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ds_compress.config.schema.distillation import EmbeddingLoss, HiddenLoss, Loss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.errors import ConfigError, Problem


@dataclass(frozen=True)
class ModelPair:
    """What is known of student and teacher before training.

    widths: hidden sizes of student and teacher, or None where a config has none. heads: the largest number of
    attention heads that divides every query, key and value of both. gather: [rows, ...] of this process -> those of
    all, in the same order everywhere, without a gradient, and the index of the first one of this process.
    """

    widths: tuple[int, int] | None = None
    heads: int = 1
    gather: Callable[[torch.Tensor], tuple[torch.Tensor, int]] = lambda rows: (rows.detach(), 0)


UNKNOWN = ModelPair()
"""Two models without configs, in one process."""


class DistillationLoss:
    """A scalar from the captured activations of both models: the distance of the student from the teacher.

    name: its key in the JSON. captures: the activations that it needs, see `ActivationCapture`. module: what is trained
    beside the student, or None; made in the constructor, trained with the student, not exported.
    """

    name: ClassVar[str]
    captures: ClassVar[frozenset[str]] = frozenset()
    module: nn.Module | None = None

    def __init__(self, config: Loss, pair: ModelPair = ModelPair()) -> None:
        self._schedule = config

    def weight_at(self, step: int) -> float:
        """The factor at `step` applied steps."""
        return self._schedule.weight_at(step)

    def __call__(self, student: CapturedActivations, teacher: CapturedActivations) -> torch.Tensor:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The state of the loss, equal in every process."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


def mean_over_tokens(values: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of (batch, tokens) over real tokens; plain mean for any other shape (one row per example)."""
    if token_mask is None or token_mask.shape != values.shape:
        return values.mean()
    mask = token_mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp_(min=1.0)


def distance(kind: str, own: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """[..., width] twice -> [...]: mean squared error over the width, or one minus the cosine."""
    if own.shape != theirs.shape:
        raise ConfigError(
            [
                Problem(
                    "compression_training.distillation.losses",
                    f"hidden states {tuple(own.shape)} and {tuple(theirs.shape)}",
                    "a teacher with the student's hidden size, or models with a hidden_size in their config",
                    "logits and attention work across widths",
                )
            ]
        )
    own, theirs = own.float(), theirs.float()
    if kind == "mse":
        return (own - theirs).square().mean(-1)
    return 1.0 - nn.functional.cosine_similarity(own, theirs, dim=-1)


def projection(pair: ModelPair) -> nn.Linear | None:
    """The learned matrix from the student's width to the teacher's (Jiao et al. 2020, W_h); None for equal widths."""
    if pair.widths is None or pair.widths[0] == pair.widths[1]:
        return None
    return nn.Linear(*pair.widths, bias=False)


class StateDistillation(DistillationLoss):
    """A loss that compares states of the student, projected where the widths differ, with states of the teacher."""

    def __init__(self, config: HiddenLoss | EmbeddingLoss, pair: ModelPair = UNKNOWN) -> None:
        super().__init__(config, pair)
        self.kind = config.kind
        self.module = projection(pair)

    def distance(
        self, own: torch.Tensor, theirs: torch.Tensor, token_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """(batch, tokens, width) twice -> the mean distance of real tokens, a scalar."""
        projected = own if self.module is None else self.module(own)
        return mean_over_tokens(distance(self.kind, projected, theirs), token_mask)
