"""`losses.router`: the routing of mixtures of experts."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from ds_compress.config.schema.distillation import RouterLoss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.losses.base import UNKNOWN, DistillationLoss, ModelPair, mean_over_tokens
from ds_compress.distill.router_logits import RouterLogits


class RouterDistillation(DistillationLoss):
    """T^2 * KL(teacher || student) between softmax(logits / T) over experts, mean over real tokens and mapped layers.

    A student with fewer experts is compared over those that it has left, among which the teacher's shares are spread
    anew. Layers of which one is no mixture are left out.
    """

    name: ClassVar[str] = "router"
    captures: ClassVar[frozenset[str]] = frozenset({"routers"})

    def __init__(self, config: RouterLoss, pair: ModelPair = UNKNOWN) -> None:
        super().__init__(config, pair)
        self.temperature = config.temperature

    def __call__(self, student: CapturedActivations, teacher: CapturedActivations) -> torch.Tensor:
        common = [layer for layer in student.routers if layer in teacher.routers]
        divergences = [
            self._divergence(student.routers[layer], teacher.routers[layer], student.token_mask)
            for layer in common
        ]
        return torch.stack(divergences).mean()

    def _divergence(
        self, own: RouterLogits, theirs: RouterLogits, token_mask: torch.Tensor | None
    ) -> torch.Tensor:
        wanted = theirs.of_experts(own)
        predicted, wanted = (
            F.log_softmax(logits.float() / self.temperature, dim=-1) for logits in (own.logits, wanted)
        )
        rows = F.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1)
        if token_mask is not None and rows.numel() == token_mask.numel():
            rows = rows.view(token_mask.shape)
        return self.temperature**2 * mean_over_tokens(rows, token_mask)
