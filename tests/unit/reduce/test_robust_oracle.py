"""Robust rules and verdicts against plain fp64 loops over the definitions, under the attacks of the literature.

The same cases run against ByzFL where that is installed (test_reduce_oracle); these need nothing.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from ds_compress.reduce.outliers import MEMORY_STEPS, OutlierDetector, Report
from ds_compress.reduce.robust import Policy, decide
from ds_compress.reduce.rules import centered_clip_weights, median, mixing, norm_clip_weights, trimmed_mean

Rows = list[list[float]]
CASES = [
    (n, f, attack)
    for n, f in ((3, 1), (5, 1), (8, 2), (7, 3))
    for attack in ("none", "sign flip", "IPM", "ALIE", "huge")
]


def attacked(n: int, f: int, attack: str, m: int = 60) -> torch.Tensor:
    """n gradients fp64 (n, m); the last f are made of the mean mu and the deviation s of the others."""
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(m, generator=generator, dtype=torch.float64) + torch.randn(
        (n, m), generator=generator, dtype=torch.float64
    )
    honest = rows[: n - f]
    mu, s = honest.mean(0), honest.std(0)
    rows[n - f :] = {
        "none": rows[n - 1],
        "sign flip": -mu,
        "IPM": -3.0 * mu,  # Xie et al. 2020
        "ALIE": mu - 1.5 * s,  # Baruch et al. 2019
        "huge": torch.full_like(mu, 1e30),
    }[attack]
    return rows


def distance(a: list[float], b: list[float]) -> float:
    return math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def plain_clip(rows: Rows, times: int) -> list[float]:
    """Karimireddy et al. 2021, algorithm 2, at the median distance."""
    centre = [0.0] * len(rows[0])
    for _ in range(times):
        distances = [distance(row, centre) for row in rows]
        radius = statistics.median(distances)
        factors = [min(1.0, radius / d) if d else 1.0 for d in distances]
        centre = [
            c + math.fsum(w * (row[i] - c) for w, row in zip(factors, rows, strict=True)) / len(rows)
            for i, c in enumerate(centre)
        ]
    return centre


def plain_mixing(rows: Rows, f: int) -> Rows:
    """Allouah et al. 2023: each becomes the mean of the n - f nearest to it, itself among them."""
    mixed = []
    for own in rows:
        nearest = sorted(rows, key=lambda other: distance(own, other))[: len(rows) - f]
        mixed.append([math.fsum(column) / len(nearest) for column in zip(*nearest, strict=True)])
    return mixed


def same(result: torch.Tensor, expected: Rows | list[float]) -> None:
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("n", "f", "attack"), CASES)
def test_coordinates(n: int, f: int, attack: str) -> None:
    rows = attacked(n, f, attack)
    columns = [sorted(column) for column in rows.T.tolist()]
    same(trimmed_mean(rows.clone(), f), [math.fsum(c[f : n - f]) / (n - 2 * f) for c in columns])
    same(median(rows.clone()), [statistics.median(c) for c in columns])


@pytest.mark.parametrize(("n", "f", "attack"), [case for case in CASES if case[2] != "huge"])
def test_clipping_and_mixing(n: int, f: int, attack: str) -> None:
    rows = attacked(n, f, attack)
    gram, lists = rows @ rows.T, rows.tolist()
    same(centered_clip_weights(gram) @ rows, plain_clip(lists, 3))
    same(norm_clip_weights(gram) @ rows, plain_clip(lists, 1))
    if (
        f == 1 or attack == "none"
    ):  # equal attackers are equally near: which of them counts is up to the order
        same(mixing(gram, f) @ rows, plain_mixing(lists, f))


class TestQuota:
    """At most max_malicious workers are dropped, and those with NaN are the first of them."""

    def keep(
        self, nan: list[int], large: list[int], quota: int, flagged: tuple[int, ...] = ()
    ) -> tuple[int, ...]:
        rows = attacked(9, 1, "none")
        for worker, factor in zip(large, (1e3, 1e4, 1e5), strict=False):
            rows[worker] *= factor
        rows[nan] = math.nan
        policy = Policy("trimmed_mean", max_malicious=quota, on_outlier="exclude")
        decision = decide(rows @ rows.T, nan, policy, flagged)
        assert decision.trim == max(0, quota - (9 - len(decision.included)))
        assert not decision.overflow
        return decision.included

    def test_nan_takes_a_place_of_the_quota(self) -> None:
        assert self.keep([2], [4, 6], quota=1) == (0, 1, 3, 4, 5, 6, 7, 8), "none is left for the large ones"
        assert self.keep([2], [4, 6], quota=2) == (0, 1, 3, 4, 5, 7, 8), "one is left: the largest"
        assert self.keep([2], [4, 6], quota=3) == (0, 1, 3, 5, 7, 8)
        assert self.keep([2, 3], [4, 6], quota=3) == (0, 1, 4, 5, 7, 8)

    def test_a_suspect_with_nan_is_one_worker_and_not_two(self) -> None:
        assert self.keep([2], [4], quota=2, flagged=(2,)) == (0, 1, 3, 5, 6, 7, 8)
        assert self.keep([2], [4], quota=2, flagged=(2, 4)) == (0, 1, 3, 5, 6, 7, 8)
        assert self.keep([2], [], quota=2, flagged=(0, 1)) in ((1, 3, 4, 5, 6, 7, 8), (0, 3, 4, 5, 6, 7, 8))


class TestHistory:
    """What a step counts for later: it fades by 1 / MEMORY_STEPS a step, and is bounded."""

    def test_the_memory_is_as_long_as_it_says(self) -> None:
        """A worker ten times the median for k steps, then like all others: for how long is it named?"""
        assert MEMORY_STEPS == 20
        ratio, kept = 5.0, 1 - 1 / 20
        for bad in (5, 20, 60):
            watch, logs, counts = OutlierDetector(ratio), 0.0, 0.0
            for step in range(bad + 60):
                norms = torch.ones(5, dtype=torch.float64)
                norms[1] = 10.0 if step < bad else 1.0
                found = watch.update(Report(norms, torch.zeros(5)))
                logs, counts = kept * logs + math.log(float(norms[1])), kept * counts + 1
                assert (found.outliers == (1,)) is (logs > counts * math.log(ratio)), (bad, step)
            assert watch.flagged == ()

    def test_a_steady_worker_is_forgotten_after_some_steps_and_not_after_hundreds(self) -> None:
        watch = OutlierDetector(5.0)
        norms = torch.ones(5, dtype=torch.float64)
        norms[1] = 10.0
        for _ in range(500):
            watch.update(Report(norms, torch.zeros(5)))
        quiet = 0
        while watch.flagged:
            watch.update(Report(torch.ones(5, dtype=torch.float64), torch.zeros(5)))
            quiet += 1
        # log 10 * 0.95^q <= log 5: seven steps, however long it was bad before.
        assert quiet == 7
