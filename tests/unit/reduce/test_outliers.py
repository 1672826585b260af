"""Which workers stand out, in one step and over many."""

from __future__ import annotations

import pytest
import torch

from ds_compress.reduce.outliers import OutlierDetector, Report, report
from tests.unit.reduce.gradients import workers


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
