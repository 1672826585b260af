"""What each score of a unit is, against the sentence of its paper, and what it forgets when a mask was made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ds_compress.select import unit_scores
from ds_compress.select.unit_scores import L2Norm, LearnedUnits, MeanActivation, TaylorUnits, UnitScore
from ds_compress.select.units import global_counts
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup
from ds_compress.techniques.depth_pruning import _HandOn

STRUCTURE = PrunableGroup("s", GroupKind.ROW, ("s",), 4, ())
NOTHING = torch.zeros(4, dtype=torch.float64)


def alone(values: torch.Tensor) -> torch.Tensor:
    """The sum over a process group of one."""
    return values


def seen(score: UnitScore, *values: float) -> None:
    """One step in which the units had these gathered sums."""
    part = torch.tensor(values, dtype=torch.float64)
    if isinstance(score, MeanActivation):
        score.observe("s", part, 1)
    else:
        score.accumulate("s", part, {"lr": 0.1})
    score.reduce(alone, alone)


@pytest.mark.parametrize("kind", [TaylorUnits, MeanActivation])
def test_scores_accumulate_since_the_last_mask(kind: Callable[..., UnitScore]) -> None:
    score = kind([STRUCTURE], seed=0)
    seen(score, 1.0, 2.0, 3.0, 4.0)
    seen(score, 1.0, 0.0, 0.0, 0.0)
    assert score.scores_of("s", NOTHING).tolist() == [2.0, 2.0, 3.0, 4.0]
    score.after_selection()
    assert score.scores_of("s", NOTHING).tolist() == [0.0] * 4
    seen(score, 0.0, 1.0, 0.0, 0.0)
    assert score.scores_of("s", NOTHING).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_taylor_takes_absolute_values_before_it_sums() -> None:
    weights, gradients = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([-1.0, -1.0, 1.0])
    assert TaylorUnits([STRUCTURE], 0).gradient_terms(weights, gradients).tolist() == [1.0, 2.0, 3.0]


def test_topk_keeps_the_sign() -> None:
    weights, gradients = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, -1.0])
    assert LearnedUnits([STRUCTURE], 0).gradient_terms(weights, gradients).tolist() == [-1.0, 2.0]


def test_l2_is_a_norm() -> None:
    score = L2Norm([STRUCTURE], 0)
    assert score.weight_terms(torch.tensor([3.0, -4.0])).tolist() == [9.0, 16.0]
    assert score.scores_of("s", torch.tensor([25.0, 0.0, 1.0, 4.0])).tolist() == [5.0, 0.0, 1.0, 2.0]


def test_learned_scores_start_around_zero() -> None:
    many = PrunableGroup("s", GroupKind.ROW, ("s",), 10_000, ())
    scores = LearnedUnits([many], seed=1).scores_of("s", torch.zeros(10_000))
    bound = 10_000**-0.5
    assert float(scores.min()) < -0.98 * bound and float(scores.max()) > 0.98 * bound
    assert bool((scores.abs() <= bound).all()) and abs(float(scores.mean())) < 0.05 * bound


def test_random_scores_depend_on_seed_and_name_alone() -> None:
    one, other = (
        PrunableGroup("a", GroupKind.ROW, ("a",), 5, ()),
        PrunableGroup("b", GroupKind.ROW, ("b",), 5, ()),
    )
    together = unit_scores.RandomUnits([one, other], seed=3)
    swapped = unit_scores.RandomUnits([other, one], seed=3)
    for name in ("a", "b"):
        assert torch.equal(together.scores_of(name, NOTHING), swapped.scores_of(name, NOTHING))
    assert not torch.equal(together.scores_of("a", NOTHING), together.scores_of("b", NOTHING))
    assert not torch.equal(
        together.scores_of("a", NOTHING), unit_scores.RandomUnits([one], seed=4).scores_of("a", NOTHING)
    )


def test_structures_of_different_scale_compete_by_their_share_of_the_norm() -> None:
    """Without the norm, the larger weights of the first would take all places."""
    large, small = torch.tensor([100.0, 90.0, 80.0, 1.0]), torch.tensor([0.3, 0.2, 0.001, 0.0])
    assert global_counts([large, small], 5, 1) == [3, 2]


@pytest.mark.parametrize(
    ("total", "expected"), [(7, [8, 4]), (6, [4, 4]), (4, [4, 4]), (2, [4, 4]), (16, [8, 8])]
)
def test_shares_are_rounded_to_the_nearest_multiple(total: int, expected: list[int]) -> None:
    first = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.5, 0.02, 0.01])
    second = torch.tensor([0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]) + 1e-6
    if total == 16:
        second = first
    assert global_counts([first, second], total, 4) == expected


def test_a_bypassed_layer_gets_a_gradient_of_zeros() -> None:
    """Without any, ZeRO-3 goes on with its last one."""
    hidden, output = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    handed_on = _HandOn.apply(hidden, output)
    assert torch.equal(handed_on, hidden)
    handed_on.pow(2).sum().backward()
    assert torch.equal(hidden.grad, 2 * hidden.detach())
    assert torch.equal(output.grad, torch.zeros(3))
