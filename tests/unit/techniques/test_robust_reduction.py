"""The robust rule in one process: its demands, its report, its verdicts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ds_compress
from ds_compress.config.schema.robust_reduction import RobustReductionConfig
from ds_compress.reduce.outliers import OutlierAbortError, report
from ds_compress.techniques.robust_reduction import RobustReduction
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, train

pytestmark = pytest.mark.usefixtures("single_process")


def test_rules_that_outvote_need_enough_workers() -> None:
    with (
        pytest.raises(ds_compress.ConfigError, match="at most 0 with 1 data-parallel processes"),
        engine_of(tiny_bert(), ds_config(0, {"robust_reduction": {"enabled": True}})),
    ):
        pass


def test_the_monitor_gets_every_worker(tmp_path: Path) -> None:
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    block = {"robust_reduction": {"enabled": True, "max_malicious": 0}}
    with engine_of(tiny_bert(), ds_config(2, block, csv_monitor=monitor)) as engine:
        train(engine, batches(2))
    for number in ("norm", "cosine", "accused"):
        (file,) = tmp_path.rglob(f"*robust_reduction_worker_0_{number}.csv")
        rows = file.read_text().splitlines()[1:]
        assert len(rows) == 2
        assert float(rows[0].split(",")[1]) == pytest.approx(
            {"cosine": 1.0, "accused": 0.0}.get(number, 2.0), abs=2.0
        )


def judged(norms: list[float], non_finite: tuple[int, ...] = (), **keys: Any) -> RobustReduction:
    """After one step in which workers of these gradient norms, all of one direction, were summed."""
    reduction = RobustReduction(RobustReductionConfig(**{"enabled": True, **keys}))
    reduction.engine = SimpleNamespace(log_events=lambda events: None)  # type: ignore[assignment]
    reduction.group = None
    lengths = torch.tensor(norms, dtype=torch.float64)
    gram = torch.outer(lengths, lengths)
    # Two buckets of half a gradient's square each.
    for _ in range(2):
        reduction._add_report(gram / 2, report(gram / 2, non_finite, reduction.block.outlier_ratio))
    reduction.judge(7)
    return reduction


def test_norms_are_those_of_all_buckets_together() -> None:
    reduction = judged([1.0, 2.0, 3.0])
    numbers = reduction.metrics()
    assert [numbers[f"worker_{w}_norm"] for w in range(3)] == pytest.approx([1.0, 2.0, 3.0])
    assert [numbers[f"worker_{w}_cosine"] for w in range(3)] == pytest.approx([1.0] * 3)
    assert not any(numbers[f"worker_{w}_accused"] for w in range(3))


def test_a_far_too_long_gradient_is_named_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    reduction = judged([1.0, 1.0, 100.0])
    assert reduction.metrics()["worker_2_accused"] == 1.0
    assert reduction.flag_counts.counts == {2: 1}
    assert reduction.report_details() == {"flagged_workers": {"2": 1}, "judged_steps": 1}
    assert reduction.history(7) == {"flagged_workers": 1.0}
    assert "step 7" in caplog.text


def test_abort_ends_the_run_by_name() -> None:
    with pytest.raises(OutlierAbortError, match=r"step 7: .*2.*on_outlier is abort"):
        judged([1.0, 1.0, 100.0], on_outlier="abort")


def test_more_bad_workers_than_were_promised_do_not_abort() -> None:
    """NaN in all of them is an overflow of the loss scale, not an attack."""
    reduction = judged([1.0, 1.0, 1.0], non_finite=(0, 1, 2), on_outlier="abort")
    assert reduction.last_report is not None
    assert reduction.last_report.flagged == (0, 1, 2)
