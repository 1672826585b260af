"""Formulas that losses are compared with."""

from __future__ import annotations

import torch


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the last axis of two tensors of probabilities."""
    return (p * (p.log() - q.log())).sum(-1)
