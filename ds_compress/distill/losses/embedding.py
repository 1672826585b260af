"""`losses.embedding`: the inputs of the first layer."""

from __future__ import annotations

from typing import ClassVar

import torch

from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.losses.base import StateDistillation


class EmbeddingDistillation(StateDistillation):
    """Mean squared error, or 1 - cosine, between the inputs of the first layers (Jiao et al. 2020, equation 9)."""

    name: ClassVar[str] = "embedding"
    captures: ClassVar[frozenset[str]] = frozenset({"embedding"})

    def __call__(self, student: CapturedActivations, teacher: CapturedActivations) -> torch.Tensor:
        assert student.embedding is not None and teacher.embedding is not None
        return self.distance(student.embedding, teacher.embedding, student.token_mask)
