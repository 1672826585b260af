"""The distillation losses. A new one is one class here: a config model goes in, two records give a scalar."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F

from ds_compress.config.distillation import AttentionLoss, HiddenLoss, LogitsLoss
from ds_compress.distill.record import Record


class DistillationLoss(Protocol):
    """What every loss has: the name of its JSON key, a weight, and a scalar for a pair of records."""

    name: ClassVar[str]
    weight: float

    def __call__(self, student: Record, teacher: Record) -> torch.Tensor: ...


class LogitsDistillation:
    """T^2 * KL(teacher || student) of predictions softened by T (Hinton et al. 2015), mean over rows or tokens.

    Padded vocabularies are cut to the smaller of the two.
    """

    name: ClassVar[str] = "logits"

    def __init__(self, config: LogitsLoss) -> None:
        self.weight = config.weight
        self.temperature = config.temperature

    def __call__(self, student: Record, teacher: Record) -> torch.Tensor:
        assert student.logits is not None and teacher.logits is not None
        classes = min(student.logits.shape[-1], teacher.logits.shape[-1])
        predicted = F.log_softmax(student.logits[..., :classes].float() / self.temperature, dim=-1)
        wanted = F.log_softmax(teacher.logits[..., :classes].float() / self.temperature, dim=-1)
        divergence = F.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1)
        return mean_over_tokens(divergence, student.token_mask) * self.temperature**2


class HiddenDistillation:
    """Mean squared error, or 1 - cosine, between hidden states of mapped layers (Jiao et al. 2020, equation 8)."""

    name: ClassVar[str] = "hidden"

    def __init__(self, config: HiddenLoss) -> None:
        self.weight = config.weight
        self.kind = config.kind

    def __call__(self, student: Record, teacher: Record) -> torch.Tensor:
        distances = []
        for own, theirs in zip(student.hidden, teacher.hidden, strict=True):
            own, theirs = own.float(), theirs.float()
            if self.kind == "mse":
                distance = (own - theirs).square().mean(-1)
            else:
                distance = 1.0 - F.cosine_similarity(own, theirs, dim=-1)
            distances.append(mean_over_tokens(distance, student.token_mask))
        return torch.stack(distances).mean()


class AttentionDistillation:
    """KL between self-attention relations of student and teacher: MiniLMv2 (Wang et al. 2021, equations 4-6).

    A relation is softmax(A A^T / sqrt(d)) for A the queries, keys or values regrouped into `heads` heads. It
    needs no attention map from the kernel (SDPA and flash attention give none) and the widths may differ.
    """

    name: ClassVar[str] = "attention"

    def __init__(self, config: AttentionLoss, heads: int) -> None:
        self.weight = config.weight
        self.heads = config.relation_heads or heads

    def __call__(self, student: Record, teacher: Record) -> torch.Tensor:
        divergences = []
        for own, theirs in zip(student.relations, teacher.relations, strict=True):
            for a, b in zip(own, theirs, strict=True):
                predicted = self._relation(a, student.token_mask)
                wanted = self._relation(b, student.token_mask)
                divergence = F.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1).mean(1)
                divergences.append(mean_over_tokens(divergence, student.token_mask))
        return torch.stack(divergences).mean()

    def _relation(self, projected: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        """log of the relation, (batch, heads, tokens, tokens)."""
        batch, tokens, width = projected.shape
        heads = projected.float().view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
        scores = heads @ heads.transpose(2, 3) / (width // self.heads) ** 0.5
        if token_mask is not None:
            # Not -inf: a KL term of 0 * (-inf - -inf) would be NaN.
            scores = scores.masked_fill(~token_mask[:, None, None, :], -1e4)
        return F.log_softmax(scores, dim=-1)


def mean_over_tokens(values: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of (batch, tokens) over real tokens; plain mean for any other shape (one row per example)."""
    if token_mask is None or token_mask.shape != values.shape:
        return values.mean()
    mask = token_mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp_(min=1.0)
