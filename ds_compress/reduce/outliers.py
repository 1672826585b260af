"""Which workers are outliers, from the inner products of their gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

MEMORY_STEPS = 20


class OutlierAbortError(RuntimeError):
    """A worker's gradient was flagged, and `on_outlier` is `abort`."""


@dataclass(frozen=True)
class Report:
    """Statistics of one reduction, or of all reductions of a step; the same in every process.

    norms, cosines: fp64 (n,); norm of each worker's gradient, and its cosine to the mean of all finite ones.
    non_finite: workers whose gradient held NaN or Inf. outliers: workers with a norm far above the median.
    """

    norms: torch.Tensor
    cosines: torch.Tensor
    non_finite: tuple[int, ...] = ()
    outliers: tuple[int, ...] = ()

    @property
    def flagged(self) -> tuple[int, ...]:
        return tuple(sorted({*self.non_finite, *self.outliers}))


def report(gram: torch.Tensor, non_finite: Sequence[int], ratio: float) -> Report:
    """From the inner products (n, n) fp64, of which the rows of non-finite workers are ignored."""
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


class OutlierDetector:
    """Distinguishes a worker that is an outlier step after step from an honest one with a rare batch.

    Norms of honest gradients have heavy tails: in a model that has learned its task, one small batch in forty has five
    times the median norm. So a worker is an outlier when the geometric mean of its norm over the median norm, over
    about the last `MEMORY_STEPS` steps, is above `ratio`; or at once when that of this step alone is above its square.
    """

    def __init__(self, ratio: float) -> None:
        self._limit = math.log(ratio)
        self._logs: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None

    @property
    def flagged(self) -> tuple[int, ...]:
        """The outliers up to the last step, the same in every process."""
        return _indices(self._is_outlier())

    def update(self, found: Report) -> Report:
        """The report of a step with the outliers over the steps so far, not of this one; called once per step."""
        finite = torch.isfinite(found.norms)
        middle = found.norms[finite].quantile(0.5) if finite.any() else torch.tensor(0.0)
        if not middle > 0:
            return found
        # Bounded, so that no single step dominates the mean.
        logs = (found.norms / middle).log().clamp(-3 * self._limit, 3 * self._limit)
        if self._logs is None or self._counts is None:
            self._logs, self._counts = torch.zeros_like(logs), torch.zeros_like(logs)
        kept = 1 - 1 / MEMORY_STEPS
        self._logs = torch.where(finite, self._logs * kept + logs, self._logs)
        self._counts = torch.where(finite, self._counts * kept + 1, self._counts)
        at_once = logs >= 2 * self._limit
        return replace(found, outliers=_indices((self._is_outlier() | at_once) & finite))

    def _is_outlier(self) -> torch.Tensor:
        if self._logs is None or self._counts is None:
            return torch.zeros(0, dtype=torch.bool)
        return self._logs > self._limit * self._counts

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` takes; empty before the first step."""
        if self._logs is None or self._counts is None:
            return {}
        return {"logs": self._logs, "counts": self._counts}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continues from a `state`; starts anew from an empty one."""
        self._logs, self._counts = state.get("logs"), state.get("counts")


def _indices(flags: torch.Tensor) -> tuple[int, ...]:
    return tuple(flags.nonzero().flatten().tolist())


@dataclass
class FlagCounts:
    """Counts over a run: in how many steps each worker was flagged, and of how many steps."""

    steps: int = 0
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, flagged: Sequence[int]) -> None:
        self.steps += 1
        for worker in flagged:
            self.counts[worker] = self.counts.get(worker, 0) + 1
