"""Metrics reach DeepSpeed's monitor, at the interval of its prints and with tags of our own."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import ds_compress  # noqa: F401
from ds_compress.engine.step import monitoring
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, pruning_block, train
from tests.multirank.training import quantization_block

pytestmark = pytest.mark.usefixtures("single_process")


def logged(folder: Path, tag: str) -> list[tuple[int, float]]:
    with open(folder / "job" / f"{tag.replace('/', '_')}.csv") as file:
        return [(int(samples), float(value)) for samples, value in list(csv.reader(file))[1:]]


@pytest.mark.parametrize("stage", [0, 2])
def test_metrics_are_written_to_the_monitor_at_print_steps(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    block = pruning_block(density=0.25, schedule_offset=3) | quantization_block()
    config = ds_config(stage, block, csv_monitor=monitor) | {"steps_per_print": 2}
    with engine_of(tiny_bert(), config) as engine:
        asked = []
        metrics = engine.compression.metrics

        def counted() -> dict[str, float]:
            asked.append(engine.global_steps)
            return metrics()

        monkeypatch.setattr(engine.compression, "metrics", counted)
        train(engine, batches(5))
        expected = metrics()
        # A number may cost a wait for the device: nothing is asked for between the prints.
        assert asked == [2, 4]
    sparsity = logged(tmp_path, "Compress/sparse_pruning/sparsity")
    assert sparsity == [(8, 0.0), (16, pytest.approx(0.75, abs=1e-3))]
    assert [value for _, value in logged(tmp_path, "Compress/weight_quantization/mean_bits")] == [8.0, 8.0]
    for name in expected:
        assert len(logged(tmp_path, f"Compress/{name}")) == 2


def test_without_a_monitor_nothing_is_asked_in_quiet(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "ds_compress")
    with engine_of(tiny_bert(), ds_config(0, pruning_block()) | {"steps_per_print": 1}) as engine:
        monkeypatch.setattr(engine.compression, "metrics", lambda: pytest.fail("asked"))
        train(engine, batches(2))


@pytest.mark.parametrize(
    ("steps_per_print", "expected"), [(2, ["step 2", "step 4"]), (None, []), (float("inf"), []), (10, [])]
)
def test_the_log_has_a_line_where_deepspeed_prints_its_own(
    steps_per_print: Any, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    block = pruning_block(density=0.25, schedule_offset=3) | quantization_block()
    config = ds_config(0, block) | {"steps_per_print": steps_per_print}
    if steps_per_print is None:
        del config["steps_per_print"]
    with caplog.at_level("INFO", "ds_compress"), engine_of(tiny_bert(), config) as engine:
        train(engine, batches(5))
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == expected
    if expected:
        assert "sparse_pruning/sparsity 0," in lines[0] and "sparse_pruning/sparsity 0.75," in lines[1]
        assert "weight_quantization/mean_bits 8" in lines[0]


def test_a_line_is_short_with_a_thousand_workers() -> None:
    line = monitoring.in_short({f"robust_reduction/worker_{n}_norm": float(n) for n in range(1000)})
    assert line.endswith("worker_11_norm 11 and 988 more in engine.compression.metrics()")


@pytest.mark.parametrize(("steps_per_print", "interval"), [(7, 7), (None, 10), (float("inf"), 10), (0.5, 1)])
def test_interval(steps_per_print: Any, interval: int) -> None:
    assert monitoring.interval(steps_per_print) == interval
