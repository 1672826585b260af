"""What the inner products of the workers' gradients say about each worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


class OutlierAbort(RuntimeError):
    """A worker's gradient stood out, and `on_outlier` is `abort`."""


@dataclass(frozen=True)
class Report:
    """About one reduction, or about all of a step; the same in every process.

    norms, cosines: fp64 (n,); length of each worker's gradient, and its cosine to the mean of all finite ones.
    non_finite: workers whose gradient held NaN or Inf. outliers: workers with a norm far above the median.
    """

    norms: torch.Tensor
    cosines: torch.Tensor
    non_finite: tuple[int, ...] = ()
    outliers: tuple[int, ...] = ()

    @property
    def accused(self) -> tuple[int, ...]:
        return tuple(sorted({*self.non_finite, *self.outliers}))


def report(gram: torch.Tensor, non_finite: Sequence[int], ratio: float) -> Report:
    """From the inner products (n, n) fp64, in which the rows of non-finite workers do not count."""
    n = len(gram)
    finite = [i for i in range(n) if i not in set(non_finite)]
    norms = torch.full((n,), torch.nan, dtype=torch.float64)
    cosines = norms.clone()
    if finite:
        part = gram[finite][:, finite]
        own = part.diagonal().clamp(min=0).sqrt()
        to_mean = part.mean(1)
        length = part.mean().clamp(min=0).sqrt()
        norms[finite] = own
        cosines[finite] = torch.where(own * length > 0, to_mean / (own * length), 0.0)
        limit = ratio * own.quantile(0.5)
        outliers = tuple(i for i, norm in zip(finite, own.tolist(), strict=True) if norm > limit)
    else:
        outliers = ()
    return Report(norms, cosines, tuple(non_finite), outliers)


@dataclass
class Accusations:
    """Counts over a run: how often each worker was named, and in how many steps."""

    steps: int = 0
    named: dict[int, int] = field(default_factory=dict)

    def add(self, accused: Sequence[int]) -> None:
        self.steps += 1
        for worker in accused:
            self.named[worker] = self.named.get(worker, 0) + 1
