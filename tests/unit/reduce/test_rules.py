"""Robust rules and verdicts, without any process group."""

from __future__ import annotations

import pytest
import torch

from ds_compress.reduce.momentum import WorkerMomentum
from ds_compress.reduce.outliers import OutlierDetector, Report, report
from ds_compress.reduce.robust import Policy, decide, describe_flagged
from ds_compress.reduce.rules import COORDINATES, WEIGHTS, centered_clip_weights, distances_to, mixing
from ds_compress.reduce.slices import Segment


def workers(n: int = 5, m: int = 300, seed: int = 0) -> torch.Tensor:
    """Gradients that mostly agree, fp64 (n, m)."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(m, generator=generator, dtype=torch.float64)
    return common + 0.3 * torch.randn((n, m), generator=generator, dtype=torch.float64)


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


class TestVerdict:
    def decision(self, rows: torch.Tensor, **policy: object) -> object:
        gram = rows @ rows.T
        bad = [i for i, row in enumerate(rows) if not bool(torch.isfinite(row).all())]
        return decide(gram, bad, Policy(**policy))  # type: ignore[arg-type]

    def test_honest_workers_all_take_part(self) -> None:
        decision = self.decision(workers())
        assert (
            decision.included == (0, 1, 2, 3, 4) and decision.report.flagged == () and not decision.overflow
        )

    def test_a_non_finite_worker_is_dropped_and_counts_as_a_bad_one(self) -> None:
        rows = workers()
        rows[2, 7] = torch.inf
        decision = self.decision(rows, rule="trimmed_mean", max_malicious=2)
        assert decision.included == (0, 1, 3, 4) and decision.trim == 1
        assert decision.report.non_finite == (2,)
        assert "worker 2" in describe_flagged(decision.report)

    def test_an_outlier_is_only_reported_unless_told_otherwise(self) -> None:
        rows = workers()
        rows[1] *= 10
        rows[1] *= 10
        reported = self.decision(rows)
        assert reported.included == (0, 1, 2, 3, 4) and reported.report.outliers == (1,)
        excluded = self.decision(rows, on_outlier="exclude")
        assert excluded.included == (0, 2, 3, 4)
        assert "worker 1: gradient norm" in describe_flagged(excluded.report)

    def test_who_stood_out_before_is_excluded_and_no_longer_trimmed(self) -> None:
        rows = workers()
        rows[1] *= 10
        suspected = decide(rows @ rows.T, [], Policy("trimmed_mean", on_outlier="exclude"), flagged=[1])
        assert suspected.included == (0, 2, 3, 4) and suspected.trim == 0
        assert self.decision(rows, on_outlier="exclude").included == (0, 1, 2, 3, 4), (
            "an honest one may do this once"
        )
        assert decide(rows @ rows.T, [], Policy("trimmed_mean"), flagged=[1]).included == (0, 1, 2, 3, 4)
        rows[1] = torch.nan
        assert decide(rows @ rows.T, [1], Policy(on_outlier="exclude"), flagged=[1]).included == (0, 2, 3, 4)

    def test_no_more_than_max_malicious_are_excluded_the_worst_first(self) -> None:
        rows = workers(7)
        rows[1] *= 100
        rows[2] *= 1000
        assert self.decision(rows, on_outlier="exclude").included == (0, 1, 3, 4, 5, 6)
        assert self.decision(rows, on_outlier="exclude", max_malicious=3).included == (0, 3, 4, 5, 6)

    def test_more_non_finite_workers_than_can_be_bad_is_an_overflow(self) -> None:
        rows = workers()
        rows[0, 0] = rows[3, 1] = torch.nan
        assert self.decision(rows, max_malicious=1).overflow
        assert not self.decision(rows, max_malicious=2).overflow

    def test_all_workers_non_finite(self) -> None:
        decision = self.decision(torch.full((3, 4), torch.nan, dtype=torch.float64), max_malicious=3)
        assert decision.overflow and decision.report.outliers == ()


def test_the_report_has_norms_and_cosines_to_the_mean() -> None:
    rows = workers()
    rows[4] = -rows[4]
    found = report(rows @ rows.T, [], 5.0)
    torch.testing.assert_close(found.norms, rows.norm(dim=1))
    expected = torch.nn.functional.cosine_similarity(rows, rows.mean(0)[None])
    torch.testing.assert_close(found.cosines, expected)
    assert float(found.cosines[4]) < 0 < float(found.cosines[0])


def test_zero_gradients_accuse_nobody() -> None:
    assert report(torch.zeros((4, 4), dtype=torch.float64), [], 5.0).flagged == ()


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


class TestWorkerMomentum:
    def sent(self, momentum: WorkerMomentum, gradient: torch.Tensor, unit: float = 1.0) -> torch.Tensor:
        cut = 3
        copy = gradient.clone()
        segments = [Segment(copy[:cut], 0, "a", 0), Segment(copy[cut:], 1, "a", cut)]
        momentum.apply(segments, unit)
        return copy

    def test_it_is_the_running_mean_and_starts_at_the_gradient(self) -> None:
        momentum, expected = WorkerMomentum(0.9), None
        for step in range(6):
            gradient = workers(1, 10, seed=step)[0].float()
            expected = gradient if expected is None else 0.9 * expected + 0.1 * gradient
            torch.testing.assert_close(self.sent(momentum, gradient), expected, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("per_step", [1, 2, 5])
    def test_beta_is_what_is_left_after_a_step(self, per_step: int) -> None:
        momentum = WorkerMomentum(0.9)
        self.sent(momentum, torch.ones(8))
        for _ in range(per_step):
            left = torch.zeros(8)
            momentum.apply([Segment(left, 0, "a", 0)], 1.0, per_step)
        torch.testing.assert_close(left, torch.full((8,), 0.9), rtol=0.02, atol=0)

    def test_it_follows_the_loss_scale(self) -> None:
        momentum, gradient = WorkerMomentum(0.5), torch.ones(8)
        self.sent(momentum, 1024 * gradient, unit=1024)
        torch.testing.assert_close(self.sent(momentum, 256 * gradient, unit=256), 256 * gradient)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_nan_is_sent_and_forgotten(self, bad: float) -> None:
        momentum, gradient = WorkerMomentum(0.5), torch.ones(8)
        self.sent(momentum, gradient)
        broken = gradient.clone()
        broken[5] = bad
        sent = self.sent(momentum, broken)
        assert not torch.isfinite(sent[5]) and torch.equal(sent[:3], gradient[:3])
        assert torch.equal(self.sent(momentum, gradient), gradient)

    def test_a_skipped_step_leaves_no_trace_and_other_cuts_are_known(self) -> None:
        momentum = WorkerMomentum(0.5)
        self.sent(momentum, torch.ones(8))
        momentum.kept.commit()
        self.sent(momentum, torch.full((8,), 9.0))
        momentum.kept.rollback()
        whole = torch.ones(8)
        momentum.apply([Segment(whole, 0, "a", 0)], 1.0)
        assert torch.equal(whole, torch.ones(8))
        more = torch.ones(10)
        momentum.apply([Segment(more, 0, "b", 0)], 1.0)
        assert torch.equal(more, torch.ones(10))


class TestWatch:
    """Norms of many steps: who is named, and how often."""

    def named(self, norms: torch.Tensor, ratio: float = 5.0) -> torch.Tensor:
        """norms (steps, n); bool (steps, n)."""
        watch, result = OutlierDetector(ratio), torch.zeros(norms.shape, dtype=torch.bool)
        for step, row in enumerate(norms.double()):
            non_finite = [i for i, norm in enumerate(row.tolist()) if norm != norm]
            found = watch.update(Report(row, torch.zeros_like(row), tuple(non_finite)))
            result[step, list(found.flagged)] = True
        return result

    def heavy_tailed(self, steps: int, n: int) -> torch.Tensor:
        """Log-normal: one norm in twenty is more than five times the median, as late in a training run."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn((steps, n), generator=generator).exp()

    def test_honest_workers_with_rare_large_batches_are_hardly_ever_named(self) -> None:
        norms = self.heavy_tailed(1000, 5)
        assert float((norms > 5 * norms.median(1, keepdim=True).values).float().mean()) > 0.03
        assert float(self.named(norms).float().mean()) < 0.01

    @pytest.mark.parametrize("factor", [10, 100, 1e30])
    def test_who_keeps_standing_out_is_named_in_nearly_every_step(self, factor: float) -> None:
        norms = self.heavy_tailed(1000, 5)
        norms[:, 4] *= factor
        named = self.named(norms).float().mean(0)
        assert named[4] > 0.95 and float(named[:4].mean()) < 0.01

    def test_the_first_step_and_a_single_huge_one_are_named_at_once_and_soon_forgotten(self) -> None:
        norms = torch.ones(40, 5)
        norms[0, 0] = 6
        norms[20, 1] = 26
        norms[30, 2] = 1e30
        named = self.named(norms)
        assert named.nonzero().tolist() == [[0, 0], [20, 1], [30, 2]]

    def test_a_single_large_norm_among_many_is_not_named(self) -> None:
        norms = torch.ones(40, 5)
        norms[20, 1] = 24
        assert not self.named(norms).any()

    def test_suspects_are_those_who_kept_standing_out_and_a_state_remembers_them(self) -> None:
        watch = OutlierDetector(5.0)
        assert watch.flagged == () and watch.state() == {}
        norms = torch.ones(5, dtype=torch.float64)
        for step in range(12):
            norms[2] = 10
            norms[3] = 1000 if step == 11 else 1
            watch.update(Report(norms, torch.zeros_like(norms)))
        assert watch.flagged == (2,)
        resumed = OutlierDetector(5.0)
        resumed.restore(watch.state())
        assert resumed.flagged == (2,)
        resumed.restore({})
        assert resumed.flagged == ()

    def test_nan_is_always_named_and_zeros_never(self) -> None:
        norms = torch.ones(3, 4)
        norms[1, 2] = torch.nan
        norms[2] = 0
        assert self.named(norms).nonzero().tolist() == [[1, 2]]
