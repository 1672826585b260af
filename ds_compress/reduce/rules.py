"""Robust aggregation rules: one vector from those of n workers, up to f of which may be arbitrary.

| rule | source | result |
|---|---|---|
| `mean` | | one bad worker moves it anywhere |
| `trimmed_mean` | Yin et al. 2018 | per coordinate, the mean without the f largest and f smallest |
| `median` | Yin et al. 2018 | per coordinate; of an even number, the mean of the middle two |
| `centered_clip` | Karimireddy et al. 2021 | v += mean(clip(x_i - v)), three times, from v = 0 |
| `norm_clip` | Sun et al. 2019 | the mean of vectors clipped to the median norm |

The radius of `centered_clip` is the median of the distances to v, anew in each iteration: a fixed one is too large for
some gradients and too small for others. The results of both clip rules are in the span of the workers' vectors, so they
are *weights* of the workers, which follow from the inner products <x_i, x_j> alone: where each rank holds a part of
each vector, one small sum over the ranks is enough, and distances need no second pass.

Before any of them but the mean, `mixing` may replace each vector by the mean of the n - f vectors nearest to it
(nearest-neighbor mixing, Allouah et al. 2023): what only some honest workers have in their data is then in most of the
mixed vectors, so that rules do not remove it. Mixing is a matter of weights, too.

Threat model: up to f workers *contribute* arbitrary vectors (a broken device, a bad shard, a poisoned or spoofed
gradient). A process that runs its own code owns a slice of the result and can write there what it likes: nothing here
protects against that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ds_compress.reduce.sorting import sort_rows_

CLIP_ITERATIONS = 3


def trimmed_mean(rows: torch.Tensor, f: int) -> torch.Tensor:
    """(m,) from `rows` (n, m), which is sorted in place; n > 2 f."""
    return sort_rows_(rows)[f : len(rows) - f].mean(0)


def median(rows: torch.Tensor, f: int = 0) -> torch.Tensor:
    """(m,) from `rows` (n, m), which is sorted in place; `f` is not used."""
    middle, odd = divmod(len(rows), 2)
    ordered = sort_rows_(rows)
    return ordered[middle].clone() if odd else (ordered[middle - 1] + ordered[middle]).mul_(0.5)


def mixing(gram: torch.Tensor, f: int) -> torch.Tensor:
    """(n, n) whose row i averages the n - f vectors nearest to x_i, itself included, from the inner products (n, n)."""
    squares = gram.diagonal()
    distances = squares[:, None] + squares[None] - 2 * gram
    distances.fill_diagonal_(-torch.inf)
    nearest = distances.argsort(dim=1, stable=True)[:, : len(gram) - f]
    return torch.zeros_like(gram).scatter_(1, nearest, 1 / (len(gram) - f))


def mean_weights(gram: torch.Tensor) -> torch.Tensor:
    """(n,): all equal."""
    return torch.full_like(gram[0], 1 / len(gram))


def norm_clip_weights(gram: torch.Tensor) -> torch.Tensor:
    """Weights (n,) from the inner products (n, n) fp64: 1/n, less for a norm above the median norm."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    return _clip(norms, _median(norms)) / len(gram)


def centered_clip_weights(gram: torch.Tensor, iterations: int = CLIP_ITERATIONS) -> torch.Tensor:
    """Weights (n,) of the vector that centered clipping ends with, from the inner products (n, n) fp64."""
    n = len(gram)
    weights = torch.zeros_like(gram[0])
    for _ in range(iterations):
        distances = distances_to(gram, weights)
        factors = _clip(distances, _median(distances)) / n
        # v + mean(factor_i (x_i - v)), in weights
        weights = weights * (1 - factors.sum()) + factors
    return weights


def distances_to(gram: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """||x_i - sum_j weights_j x_j|| for each i, from the inner products (n, n)."""
    products = gram @ weights
    squares = gram.diagonal() - 2 * products + weights @ products
    return squares.clamp(min=0).sqrt()


WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": mean_weights,
    "norm_clip": norm_clip_weights,
    "centered_clip": centered_clip_weights,
}
COORDINATES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "trimmed_mean": trimmed_mean,
    "median": median,
}


def _clip(lengths: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """What a vector of each length is multiplied by to be no longer than `radius`."""
    return torch.where(lengths > radius, radius / lengths.clamp(min=torch.finfo(lengths.dtype).tiny), 1.0)


def _median(values: torch.Tensor) -> torch.Tensor:
    """The mean of the middle two of an even number, unlike torch.median."""
    return values.quantile(0.5)
