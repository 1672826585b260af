"""A loss over logits that waits for a pass over the student's logits, to be computed beside the cross entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import torch

from ds_compress.distill.chunked_head import RowLoss


class Logits(Protocol):
    """What a `PendingLoss` needs of `LazyLogits`."""

    def sums(self, losses: Sequence[RowLoss]) -> torch.Tensor: ...

    def has_same_values_as(self, other: Self) -> bool: ...


class PendingLoss:
    """The divergence from the teacher.

    Args:
        row_loss: its sum over rows of the student's logits.
    """

    def __init__(self, row_loss: RowLoss) -> None:
        self.row_loss = row_loss
        self._value: torch.Tensor | None = None
        self._of: Logits | None = None

    def resolve(self, value: torch.Tensor, of: Logits) -> None:
        """`value` was computed beside another loss over the logits `of`."""
        self._value, self._of = value, of

    @property
    def is_pending(self) -> bool:
        return self._value is None

    def value(self, logits: Logits) -> torch.Tensor:
        """The scalar, from an earlier pass over logits of the same values or from a pass over `logits`."""
        if self._value is None or (self._of is not None and not self._of.has_same_values_as(logits)):
            self.resolve(logits.sums([self.row_loss])[0], logits)
        assert self._value is not None
        return self._value
