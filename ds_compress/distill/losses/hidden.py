"""`losses.hidden`: hidden states of mapped layers."""

from __future__ import annotations

from typing import ClassVar

import torch

from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.losses.base import StateDistillation


class HiddenDistillation(StateDistillation):
    """Mean squared error, or 1 - cosine, between hidden states of mapped layers (Jiao et al. 2020, equation 8).

    Where the widths differ, one learned matrix, shared by all layers, takes the student's states to the teacher's
    width.
    """

    name: ClassVar[str] = "hidden"
    captures: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __call__(self, student: CapturedActivations, teacher: CapturedActivations) -> torch.Tensor:
        pairs = zip(student.hidden, teacher.hidden, strict=True)
        distances = [self.distance(own, theirs, student.token_mask) for own, theirs in pairs]
        return torch.stack(distances).mean()
