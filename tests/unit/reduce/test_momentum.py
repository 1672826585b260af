"""What a worker sends: the running mean of its gradients."""

from __future__ import annotations

import pytest
import torch

from ds_compress.reduce.momentum import WorkerMomentum
from ds_compress.reduce.slices import Segment
from tests.unit.reduce.gradients import workers


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
