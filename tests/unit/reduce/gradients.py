"""Gradients of several workers, as tests of the rules take them."""

from __future__ import annotations

import torch


def workers(n: int = 5, m: int = 300, seed: int = 0) -> torch.Tensor:
    """Gradients that mostly agree, fp64 (n, m)."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(m, generator=generator, dtype=torch.float64)
    return common + 0.3 * torch.randn((n, m), generator=generator, dtype=torch.float64)
