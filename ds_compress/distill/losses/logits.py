"""`losses.logits`: the predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch

from ds_compress.config.schema.distillation import LogitsLoss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.chunked_head import RowLoss
from ds_compress.distill.divergence import divergence_of, log_probabilities, with_tail
from ds_compress.distill.lazy_logits import LazyLogits
from ds_compress.distill.losses.base import UNKNOWN, DistillationLoss, ModelPair
from ds_compress.distill.pending_loss import PendingLoss
from ds_compress.distill.sparse_logits import SparseLogits


class LogitsDistillation(DistillationLoss):
    """T^2 * divergence of predictions softened by T (Hinton et al. 2015), mean over rows or real tokens.

    Padded vocabularies are cut to the smaller of the two. Logits of a language model are compared a chunk at a time.
    """

    name: ClassVar[str] = "logits"
    captures: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __init__(self, config: LogitsLoss, pair: ModelPair = UNKNOWN) -> None:
        super().__init__(config, pair)
        self.temperature = config.temperature
        self.top_k = config.top_k
        self._divergence = divergence_of(config.kind, config.beta)

    def __call__(self, student: CapturedActivations, teacher: CapturedActivations) -> torch.Tensor:
        logits = student.logits
        assert logits is not None and not isinstance(logits, SparseLogits)
        pending = student.pending_loss or self.pending_loss(teacher, student.token_mask, logits.shape)
        if isinstance(logits, LazyLogits):
            return pending.value(logits)
        rows = logits.reshape(-1, logits.shape[-1])
        return pending.row_loss.of_rows(rows, slice(0, rows.shape[0]))

    def pending_loss(
        self, teacher: CapturedActivations, token_mask: torch.Tensor | None, shape: torch.Size | None = None
    ) -> PendingLoss:
        """The loss of a student whose logits, [batch, (tokens,) categories], are not computed yet.

        shape: of the student's logits; by default that of the teacher's.
        """
        theirs = teacher.logits
        assert theirs is not None
        leading = (theirs.shape if shape is None else shape)[:-1]
        weights = _row_weights(leading, token_mask, theirs.device) * self.temperature**2

        def of_rows(logits: torch.Tensor, rows: slice) -> torch.Tensor:
            return (self._rows(logits, predictions(rows)) * weights[rows]).sum()

        if isinstance(theirs, LazyLogits):
            flat = theirs.reshape(-1, theirs.shape[-1])
            predictions: Callable[[slice], torch.Tensor | SparseLogits] = flat.chunk_of
            return PendingLoss(RowLoss(of_rows, flat.around))
        if isinstance(theirs, SparseLogits):
            predictions = theirs.rows
        else:
            full = theirs.reshape(-1, theirs.shape[-1])
            predictions = full.__getitem__
        return PendingLoss(RowLoss(of_rows))

    def _rows(self, student: torch.Tensor, teacher: torch.Tensor | SparseLogits) -> torch.Tensor:
        """Divergence of each row, fp32 [rows]."""
        if isinstance(teacher, SparseLogits):
            own = log_probabilities(student[..., : teacher.shape[-1]], self.temperature)
            return self._divergence(with_tail(own.gather(-1, teacher.indices)), with_tail(teacher.log_probs))
        classes = min(student.shape[-1], teacher.shape[-1])
        own = log_probabilities(student[..., :classes], self.temperature)
        with torch.no_grad():
            theirs = log_probabilities(teacher[..., :classes], self.temperature)
        if self.top_k is None or self.top_k >= classes:
            return self._divergence(own, theirs)
        likely, indices = theirs.topk(self.top_k, dim=-1)
        return self._divergence(with_tail(own.gather(-1, indices)), with_tail(likely))


def _row_weights(leading: torch.Size, token_mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """fp32 [rows], sum 1: equal for all rows, or for real tokens only."""
    if token_mask is None or token_mask.shape != leading:
        rows = max(1, leading.numel())
        return torch.full((leading.numel(),), 1.0 / rows, device=device)
    mask = token_mask.reshape(-1).float()
    return mask / mask.sum().clamp_(min=1.0)
