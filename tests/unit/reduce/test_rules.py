"""Every rule against its definition, without any process group."""

from __future__ import annotations

import pytest
import torch

from ds_compress.reduce.robust import Policy, decide
from ds_compress.reduce.rules import COORDINATES, WEIGHTS, centered_clip_weights, distances_to, mixing
from tests.unit.reduce.gradients import workers


def centered_clip(rows: torch.Tensor, iterations: int = 3) -> torch.Tensor:
    """Karimireddy et al. 2021, algorithm 2, with the radius that is the median distance."""
    centre = torch.zeros_like(rows[0])
    for _ in range(iterations):
        distances = torch.stack([(row - centre).norm() for row in rows])
        radius = distances.quantile(0.5)
        steps = [(row - centre) * min(1.0, float(radius / d)) for row, d in zip(rows, distances, strict=True)]
        centre = centre + torch.stack(steps).mean(0)
    return centre


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_centered_clip_needs_only_inner_products(n: int) -> None:
    rows = workers(n)
    rows[-1] *= -10
    weights = centered_clip_weights(rows @ rows.T)
    torch.testing.assert_close(weights @ rows, centered_clip(rows))


def test_distances_follow_from_inner_products() -> None:
    rows = workers()
    weights = torch.tensor([0.5, 0.1, 0.0, -0.2, 0.3], dtype=torch.float64)
    expected = (rows - weights @ rows).norm(dim=1)
    torch.testing.assert_close(distances_to(rows @ rows.T, weights), expected)


def test_equal_workers_are_their_mean_under_every_rule() -> None:
    rows = workers(1).repeat(5, 1)
    for rule in WEIGHTS:
        torch.testing.assert_close(WEIGHTS[rule](rows @ rows.T) @ rows, rows[0])
    for rule in COORDINATES:
        torch.testing.assert_close(COORDINATES[rule](rows.clone(), 1), rows[0])


@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "centered_clip", "norm_clip"])
def test_one_worker_cannot_move_a_robust_rule_far(rule: str) -> None:
    rows = workers()
    honest = rows[:4].mean(0)
    for factor in (-1e6, 1e6):
        attacked = rows.clone()
        attacked[4] = factor * rows[4]
        if rule in WEIGHTS:
            result = WEIGHTS[rule](attacked @ attacked.T) @ attacked
            torch.testing.assert_close(result, centered_clip(attacked, 1 if rule == "norm_clip" else 3))
            # One of five is clipped as the median one is: it moves the centre by a fifth of that distance each time.
            moves = 0.3 if rule == "centered_clip" else 0.5
            assert float((result - honest).norm() / honest.norm()) < moves
        else:
            result = COORDINATES[rule](attacked.clone(), 1)
            lowest, highest = rows[:4].amin(0), rows[:4].amax(0)
            assert bool(((result >= lowest) & (result <= highest)).all()), "between the honest ones"
    assert float((attacked.mean(0) - honest).norm() / honest.norm()) > 1e4, "the mean can be moved anywhere"


class TestMixing:
    @pytest.mark.parametrize(("n", "f"), [(3, 1), (5, 1), (5, 2), (8, 2)])
    def test_each_row_is_the_mean_of_the_nearest(self, n: int, f: int) -> None:
        rows = workers(n)
        rows[0] *= 100
        mixed = mixing(rows @ rows.T, f) @ rows
        for i, row in enumerate(rows):
            nearest = sorted(range(n), key=lambda j: float((rows[j] - row).norm()))[: n - f]
            torch.testing.assert_close(mixed[i], rows[nearest].mean(0))

    @pytest.mark.parametrize("rule", ["trimmed_mean", "median", "centered_clip", "norm_clip"])
    def test_a_rule_keeps_what_only_two_of_five_workers_see(self, rule: str) -> None:
        """Coordinate-wise rules alone would drop it; the mean has 2/5 of it."""
        rows = 0.01 * workers(5)
        rows[:2, 0] += 1
        seen = []
        for neighbor_mixing in (False, True):
            decision = decide(
                rows @ rows.T, [], Policy(rule, max_malicious=1, neighbor_mixing=neighbor_mixing)
            )
            taken = rows if decision.mixing is None else decision.mixing @ rows
            if decision.weights is None:
                result = COORDINATES[rule](taken.clone(), decision.trim)
            else:
                assert decision.mixing is None
                result = decision.weights @ rows
            seen.append(float(result[0]))
        assert seen[1] > (0.2 if rule in COORDINATES else 0.1)
        if rule == "median":
            assert seen[0] < 0.1

    def test_the_mean_and_rules_with_nothing_left_to_outvote_are_not_mixed(self) -> None:
        rows = workers()
        assert decide(rows @ rows.T, [], Policy("mean")).weights.unique().tolist() == [0.2]  # type: ignore[union-attr]
        assert decide(rows @ rows.T, [], Policy("median", max_malicious=0)).mixing is None
        assert decide(rows @ rows.T, [3], Policy("median", max_malicious=1)).mixing is None
