"""What a policy decides about one sum."""

from __future__ import annotations

import torch

from ds_compress.reduce.robust import Policy, decide, describe_flagged
from tests.unit.reduce.gradients import workers


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
