"""`losses.contrastive`: the student distinguishes examples as the teacher does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ds_compress.config.schema.distillation import ContrastiveLoss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.losses.base import DistillationLoss, ModelPair


class ContrastiveDistillation(DistillationLoss):
    """The student's representation of an example is matched with the teacher's, among those of other examples.

    Negatives are the teacher's representations of the other examples of the batch, of all processes, and of a queue
    of earlier ones. The queue holds the teacher's representations before the learned projection, so that they do not
    become outdated.

    `infonce`: cross entropy of cosines / temperature (van den Oord et al. 2018, equation 4). `crd`: each pair is
    classified as the same example or not, with h = e^(cosine / temperature) / (e^(cosine / temperature) + N / M) for N
    negatives and M training examples, -log h(positive) - sum of log(1 - h(negative)) (Tian et al. 2020, equations
    10, 18 and 19).
    """

    name: ClassVar[str] = "contrastive"
    captures: ClassVar[frozenset[str]] = frozenset({"last"})
    module: nn.ModuleDict

    def __init__(self, config: ContrastiveLoss, pair: ModelPair) -> None:
        super().__init__(config, pair)
        assert pair.widths is not None
        self._config = config
        self._gather = pair.gather
        self._queue: torch.Tensor | None = None
        self.module = nn.ModuleDict(
            {
                "student": nn.Linear(pair.widths[0], config.dimension),
                "teacher": nn.Linear(pair.widths[1], config.dimension),
            }
        )

    def __call__(self, student: CapturedActivations, teacher: CapturedActivations) -> torch.Tensor:
        own = self._pooled(student.last, student.token_mask)
        theirs = self._pooled(teacher.last, student.token_mask).detach()
        everyone, first = self._gather(theirs)
        candidates = everyone if self._queue is None else torch.cat([everyone, self._queue.to(everyone)])
        cosines = self._projected("student", own) @ self._projected("teacher", candidates).T
        positives = torch.arange(first, first + own.shape[0], device=own.device)
        loss = self._loss(cosines / self._config.temperature, positives)
        if self.module.training:
            self._remember(everyone)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"queue": None if self._queue is None else self._queue.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._queue = state["queue"]

    def _loss(self, scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        if self._config.kind == "infonce":
            return F.cross_entropy(scores, positives)
        negatives = scores.shape[1] - 1
        # log(N / M), so that h = sigmoid(score - log(N / M)).
        shift = torch.tensor(max(1, negatives) / (self._config.examples or 1)).log()
        is_positive = F.one_hot(positives, scores.shape[1]).bool()
        signed = torch.where(is_positive, scores - shift, shift - scores)
        return -F.logsigmoid(signed).sum(1).mean()

    def _projected(self, side: str, pooled: torch.Tensor) -> torch.Tensor:
        matrix: nn.Linear = self.module[side]  # type: ignore[assignment]
        return F.normalize(matrix(pooled.to(matrix.weight.dtype)).float(), dim=-1)

    def _pooled(self, hidden: torch.Tensor | None, token_mask: torch.Tensor | None) -> torch.Tensor:
        """[batch, tokens, width] -> [batch, width]; [batch, width] stays."""
        assert hidden is not None
        if hidden.dim() == 2:
            return hidden
        hidden = hidden.float()
        mask = hidden.new_ones(hidden.shape[:2]) if token_mask is None else token_mask.float()
        if self._config.pooling == "mean":
            return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_(min=1.0)
        ends = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
        # Finds the first and the last real token with padding on either side.
        at = ends.argmax(1) if self._config.pooling == "last" else mask.argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), at]

    @torch.no_grad()
    def _remember(self, everyone: torch.Tensor) -> None:
        if self._config.queue:
            older = () if self._queue is None else (self._queue.to(everyone),)
            self._queue = torch.cat([everyone, *older])[: self._config.queue].float()
