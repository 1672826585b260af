"""Our rules and verdicts against ByzFL, a library of Byzantine-robust aggregation.

ByzFL's package imports torchvision and more at once, for benchmarks that are of no interest here; its aggregators and
attacks need numpy, scipy and torch. So it is installed without its dependencies, and only they are imported.
Given numpy, they compute in fp64.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch

from ds_compress.reduce.rules import centered_clip_weights, median, mixing, trimmed_mean

SPEC = importlib.util.find_spec("byzfl")
pytestmark = pytest.mark.skipif(SPEC is None, reason="ByzFL is absent: pip install --no-deps byzfl")


def byzfl(module: str) -> Any:
    """A module of ByzFL, without the package's own imports."""
    if "byzfl" not in sys.modules:
        assert SPEC is not None
        package = types.ModuleType("byzfl")
        package.__path__ = list(SPEC.submodule_search_locations or ())
        sys.modules["byzfl"] = package
    return importlib.import_module(f"byzfl.{module}")


def gradients(n: int, m: int = 400, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(m, generator=generator, dtype=torch.float64)
    return common + torch.randn((n, m), generator=generator, dtype=torch.float64)


def attacked(n: int, f: int, attack: str) -> torch.Tensor:
    """n gradients; the last f are ByzFL's attack on the others."""
    rows = gradients(n)
    honest = rows[: n - f]
    kinds = byzfl("attacks.attacks")
    made = {
        "none": lambda: rows[n - 1],
        "sign flip": lambda: kinds.SignFlipping()(honest.numpy()),
        "IPM": lambda: kinds.InnerProductManipulation(tau=3.0)(honest.numpy()),
        "ALIE": lambda: kinds.ALittleIsEnough(tau=1.5)(honest.numpy()),
        "Inf": lambda: torch.full_like(rows[0], 1e30),
    }[attack]()
    rows[n - f :] = torch.as_tensor(made)
    return rows


CASES = [
    (n, f, attack)
    for n, f in ((5, 1), (8, 2), (7, 3))
    for attack in ("none", "sign flip", "IPM", "ALIE", "Inf")
]


@pytest.mark.parametrize(("n", "f", "attack"), CASES)
def test_trimmed_mean(n: int, f: int, attack: str) -> None:
    rows = attacked(n, f, attack)
    expected = byzfl("aggregators.aggregators").TrMean(f=f)(rows.numpy())
    torch.testing.assert_close(trimmed_mean(rows.clone(), f), torch.as_tensor(expected))


@pytest.mark.parametrize(("n", "f", "attack"), CASES)
def test_median(n: int, f: int, attack: str) -> None:
    rows = attacked(n, f, attack)
    expected = byzfl("aggregators.aggregators").Median()(rows.numpy())
    torch.testing.assert_close(median(rows.clone()), torch.as_tensor(expected))


@pytest.mark.parametrize(("n", "f", "attack"), [case for case in CASES if case[2] != "Inf"])
def test_centered_clip_is_theirs_with_our_radius(n: int, f: int, attack: str) -> None:
    """ByzFL's step from a given centre at a given radius, three times, each at the median distance."""
    rows = attacked(n, f, attack)
    centre = torch.zeros_like(rows[0])
    for _ in range(3):
        radius = float((rows - centre).norm(dim=1).quantile(0.5))
        clipping = byzfl("aggregators.aggregators").CenteredClipping(L=1, tau=radius)
        clipping.m = centre.numpy()  # its constructor refuses any centre
        centre = torch.as_tensor(clipping(rows.numpy()))
    torch.testing.assert_close(centered_clip_weights(rows @ rows.T) @ rows, centre)


@pytest.mark.parametrize(("n", "f", "attack"), [case for case in CASES if case[2] != "Inf"])
def test_neighbor_mixing(n: int, f: int, attack: str) -> None:
    rows = attacked(n, f, attack)
    expected = byzfl("aggregators.preaggregators").NNM(f=f)(rows.numpy())
    torch.testing.assert_close(mixing(rows @ rows.T, f) @ rows, torch.as_tensor(expected))
