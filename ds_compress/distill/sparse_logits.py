"""A teacher's likeliest tokens and their log-probabilities: what a cache stores of its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SparseLogits:
    """indices: int64 [rows, k]. log_probs: fp32 [rows, k], at the temperature of the loss. shape: of all logits."""

    indices: torch.Tensor
    log_probs: torch.Tensor
    shape: torch.Size

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def rows(self, chosen: slice) -> SparseLogits:
        """Of some rows."""
        return SparseLogits(self.indices[chosen], self.log_probs[chosen], self.shape)
