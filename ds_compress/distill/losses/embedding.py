"""`losses.embedding`: what the first layer is given."""

from __future__ import annotations

from typing import ClassVar

import torch

from ds_compress.config.distillation import EmbeddingLoss
from ds_compress.distill.losses.base import (
    UNKNOWN,
    DistillationLoss,
    Pair,
    distance,
    mean_over_tokens,
    projection,
)
from ds_compress.distill.record import Record


class EmbeddingDistillation(DistillationLoss):
    """Mean squared error, or 1 - cosine, between the inputs of the first layers (Jiao et al. 2020, equation 9)."""

    name: ClassVar[str] = "embedding"
    records: ClassVar[frozenset[str]] = frozenset({"embedding"})

    def __init__(self, config: EmbeddingLoss, pair: Pair = UNKNOWN) -> None:
        super().__init__(config, pair)
        self.kind = config.kind
        self.module = projection(pair)

    def __call__(self, student: Record, teacher: Record) -> torch.Tensor:
        assert student.embedding is not None and teacher.embedding is not None
        own = student.embedding if self.module is None else self.module(student.embedding)
        return mean_over_tokens(distance(self.kind, own, teacher.embedding), student.token_mask)
