"""`losses.hidden`: hidden states of mapped layers."""

from __future__ import annotations

from typing import ClassVar

import torch

from ds_compress.config.distillation import HiddenLoss
from ds_compress.distill.losses.base import (
    UNKNOWN,
    DistillationLoss,
    Pair,
    distance,
    mean_over_tokens,
    projection,
)
from ds_compress.distill.record import Record


class HiddenDistillation(DistillationLoss):
    """Mean squared error, or 1 - cosine, between hidden states of mapped layers (Jiao et al. 2020, equation 8).

    Where the widths differ, one learned matrix, shared by all layers, takes the student's states to the teacher's
    width.
    """

    name: ClassVar[str] = "hidden"
    records: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __init__(self, config: HiddenLoss, pair: Pair = UNKNOWN) -> None:
        super().__init__(config, pair)
        self.kind = config.kind
        self.module = projection(pair)

    def __call__(self, student: Record, teacher: Record) -> torch.Tensor:
        distances = []
        for own, theirs in zip(student.hidden, teacher.hidden, strict=True):
            projected = own if self.module is None else self.module(own)
            distances.append(mean_over_tokens(distance(self.kind, projected, theirs), student.token_mask))
        return torch.stack(distances).mean()
