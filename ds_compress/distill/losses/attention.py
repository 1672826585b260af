"""`losses.attention`: attention relations, or attention scores."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from ds_compress.config.schema.distillation import AttentionLoss
from ds_compress.distill.activation_capture import AttentionScores, CapturedActivations
from ds_compress.distill.losses.base import UNKNOWN, DistillationLoss, ModelPair, mean_over_tokens


class RelationDistillation(DistillationLoss):
    """KL between self-attention relations of student and teacher: MiniLMv2 (Wang et al. 2021, equations 4-6).

    A relation is softmax(A A^T / sqrt(d)) for A the queries, keys or values regrouped into `heads` heads. It
    needs no attention map from the kernel (SDPA and flash attention give none) and the widths may differ.
    """

    name: ClassVar[str] = "attention"
    captures: ClassVar[frozenset[str]] = frozenset({"relations"})

    def __init__(self, config: AttentionLoss, pair: ModelPair = UNKNOWN) -> None:
        super().__init__(config, pair)
        self.heads = config.relation_heads or pair.heads

    def __call__(self, student: CapturedActivations, teacher: CapturedActivations) -> torch.Tensor:
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


class MapDistillation(DistillationLoss):
    """Mean squared error between attention scores before the softmax: TinyBERT (Jiao et al. 2020, equation 7).

    Over the pairs of real tokens that may attend to each other, the mean over heads and mapped layers.
    """

    name: ClassVar[str] = "attention"
    captures: ClassVar[frozenset[str]] = frozenset({"maps"})

    def __call__(self, student: CapturedActivations, teacher: CapturedActivations) -> torch.Tensor:
        errors = [
            self._error(own, theirs, student.token_mask)
            for own, theirs in zip(student.maps, teacher.maps, strict=True)
        ]
        return torch.stack(errors).mean()

    def _error(
        self, own: AttentionScores, theirs: AttentionScores, token_mask: torch.Tensor | None
    ) -> torch.Tensor:
        squares = (own.scores() - theirs.scores()).square().mean(1)
        tokens = squares.shape[-1]
        counted = squares.new_ones(squares.shape, dtype=torch.bool)
        if token_mask is not None:
            counted = counted & token_mask[:, :, None] & token_mask[:, None, :]
        if own.is_causal:
            counted = counted & torch.ones(tokens, tokens, dtype=torch.bool, device=squares.device).tril()
        return (squares * counted).sum() / counted.sum().clamp_(min=1)


def attention_distillation(config: AttentionLoss, pair: ModelPair) -> DistillationLoss:
    """The loss of the kind that the JSON asks for."""
    return RelationDistillation(config, pair) if config.kind == "relation" else MapDistillation(config, pair)
