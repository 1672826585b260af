"""What a run says at start and at its end: one table each, on process 0, from what the plan promised."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ds_compress
from ds_compress.config.report.table import size_in_words
from ds_compress.engine import outcome, run_end
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, pruning_block, structured_block, train
from tests.multirank.training import quantization_block
from tests.single import init_single_process


@pytest.fixture(autouse=True)
def single_process(caplog: pytest.LogCaptureFixture) -> None:
    init_single_process()
    caplog.set_level("INFO", "ds_compress")


def row_of(lines: list[str], name: str) -> list[str]:
    """The cells of the one row with this name."""
    (row,) = [line for line in lines if line.startswith(f"  {name} ")]
    return [cell.strip() for cell in row.strip().split("  ") if cell]


@contextlib.contextmanager
def resumed(folder: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """An engine that goes on after a checkpoint of step 2, and the log of that."""
    config = ds_config(1, pruning_block())
    with engine_of(tiny_bert(), config) as engine:
        train(engine, batches(2))
        engine.save_checkpoint(str(folder))
    caplog.clear()
    with engine_of(tiny_bert(), config) as engine:
        engine.load_checkpoint(str(folder))
        yield engine


BLOCKS = {
    **pruning_block(density=0.25, schedule_offset=1, schedule_offset_end=3),
    **quantization_block(),
    "row_pruning": structured_block(dense_ratio=0.5, schedule_offset=1),
    "export_to": "torch",
}


def test_the_start_is_one_table(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_bert()
    parameters = sum(p.numel() for p in model.parameters())
    with engine_of(model, ds_config(2, BLOCKS)) as engine:
        plan = engine.compression.plan
        lines = [*caplog.messages]
    (head,) = [line for line in lines if line.startswith("BertForSequenceClassification with ")]
    expected = outcome.Expected.of(plan)
    assert head == (
        f"BertForSequenceClassification with {parameters:,} parameters, ZeRO stage 2, 1 process: "
        f"{size_in_words(4 * parameters)}, predicted {size_in_words(expected.after)} in format torch"
    )
    assert 0 < expected.after < parameters
    assert row_of(lines, "sparse_pruning")[1:3] == ["steps 1-3", "sparsity 0.75"]
    assert row_of(lines, "row_pruning")[1:3] == ["from step 1", "density 0.5"]
    assert row_of(lines, "weight_quantization")[1:3] == ["from step 0", "mean_bits 8"]
    # The steps have a column of their own.
    assert not any("step" in cell for cell in row_of(lines, "row_pruning")[2:])
    rows = [line for line in lines if line.startswith("  ")]
    assert (
        len(rows) == len(plan.config.enabled_blocks()) == 4
        and len({row.index("step") for row in rows if "steps" not in row}) == 1
    )


def test_the_promise_is_what_techniques_reach(caplog: pytest.LogCaptureFixture) -> None:
    with engine_of(tiny_bert(), ds_config(1, BLOCKS)) as engine:
        expected = engine.compression.outcome.expected.numbers
        train(engine, batches(4))
        numbers = engine.compression.metrics()
    assert set(expected) == {
        "sparse_pruning/sparsity",
        "row_pruning/density",
        "weight_quantization/mean_bits",
        "activation_quantization/mean_bits",
    }
    assert {name: numbers[name] for name in expected} == pytest.approx(dict(expected), abs=1e-3)
    assert any(line.startswith("after 4 steps, all as planned: ") for line in caplog.messages)
    assert row_of(caplog.messages, "row_pruning/density")[1:] == ["0.5", "planned 0.5"]


def test_a_schedule_that_has_not_ended_is_no_success(caplog: pytest.LogCaptureFixture) -> None:
    with engine_of(tiny_bert(), ds_config(1, pruning_block(density=0.25, schedule_offset_end=9))) as engine:
        train(engine, batches(3))
    (head,) = [line for line in caplog.messages if line.startswith("after 3 steps")]
    assert "before all schedules have ended" in head
    reached, planned = row_of(caplog.messages, "sparse_pruning/sparsity")[1:]
    assert 0 < float(reached) < 0.75 and planned == "planned 0.75"
    (warning,) = [r for r in caplog.records if "not finished" in r.getMessage()]
    assert warning.levelname == "WARNING"


def test_numbers_apart_from_the_plan_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with engine_of(tiny_bert(), ds_config(1, pruning_block(density=0.25))) as engine:
        run = engine.compression
        run.outcome.expected = outcome.Expected({"sparse_pruning/sparsity": 0.8, "gone/number": 1.0})
        train(engine, batches(2))
    assert any(line == "after 2 steps, not all as planned" for line in caplog.messages)
    assert row_of(caplog.messages, "gone/number")[1:] == ["-", "planned 1"]


@pytest.mark.parametrize("shrinks", [False, True])
def test_a_shrink_keeps_what_was_promised(shrinks: bool, caplog: pytest.LogCaptureFixture) -> None:
    block = structured_block(dense_ratio=0.5, schedule_offset=1, shrink_at_end_of_schedule=shrinks)
    with engine_of(tiny_bert(), ds_config(2, {"row_pruning": block})) as engine:
        first = engine.compression
        train(engine, batches(4))
        assert (engine.compression is not first) == shrinks
    assert any(line.startswith("after 4 steps, all as planned: ") for line in caplog.messages)
    assert row_of(caplog.messages, "row_pruning/density")[1:] == ["0.5", "planned 0.5"]


class TestWhereItLies:
    def test_nothing_was_saved(self, caplog: pytest.LogCaptureFixture) -> None:
        with engine_of(tiny_bert(), ds_config(1, pruning_block())) as engine:
            train(engine, batches(2))
        assert caplog.messages[-1] == (
            'no checkpoint was saved and nothing exported; next: ds_compress.export(engine, "compressed")'
        )

    def test_the_command_runs(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = tmp_path / "with space"
        with engine_of(tiny_bert(), ds_config(1, pruning_block())) as engine:
            train(engine, batches(2))
            engine.save_checkpoint(str(folder))
        lies, _, command = caplog.messages[-1].partition("; next: ")
        assert lies == f"saved in {folder / 'global_step2'}"
        assert command.startswith("ds_compress export ") and command.endswith(" compressed")
        done = subprocess.run(
            f"{sys.executable} -m {command} --no-check",
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "compressed" / "model.safetensors").exists()

    def test_steps_after_the_last_save(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with engine_of(tiny_bert(), ds_config(1, pruning_block())) as engine:
            train(engine, batches(1))
            engine.save_checkpoint(str(tmp_path))
            train(engine, batches(2))
        assert "after 1 steps, the later ones are not" in caplog.messages[-1]

    def test_a_run_that_only_reads_a_checkpoint_tells_nothing(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with resumed(tmp_path, caplog):
            pass
        assert not [
            line for line in caplog.messages if line.startswith(("after ", "saved ", "no checkpoint"))
        ]

    def test_a_run_that_goes_on_tells_of_its_own_steps(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with resumed(tmp_path, caplog) as engine:
            train(engine, batches(1))
        assert any(line.startswith("after 3 steps") for line in caplog.messages)
        assert "after 2 steps, the later ones are not" in caplog.messages[-1]

    def test_after_finalize_the_model_is_what_is_exported(self, caplog: pytest.LogCaptureFixture) -> None:
        with engine_of(tiny_bert(), ds_config(1, pruning_block())) as engine:
            train(engine, batches(2))
            ds_compress.finalize(engine)
        assert [line for line in caplog.messages if 'ds_compress.export(model, "compressed")' in line]
        assert len([line for line in caplog.messages if line.startswith("after ")]) == 1


def test_it_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with engine_of(tiny_bert(), ds_config(1, pruning_block())) as engine:
        train(engine, batches(2))
        run = engine.compression
        run_end.say_end(run)
        run_end.say_end(run)
    assert len([line for line in caplog.messages if line.startswith("after ")]) == 1
    assert len([line for line in caplog.messages if line.startswith("no checkpoint")]) == 1


def test_quiet_computes_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("WARNING", "ds_compress")
    monkeypatch.setattr(outcome.Expected, "of", lambda *_: pytest.fail("computed"))
    with engine_of(tiny_bert(), ds_config(1, pruning_block(schedule_offset_end=9))) as engine:
        monkeypatch.setattr(engine.compression, "metrics", lambda: pytest.fail("asked"))
        train(engine, batches(2))
    # What goes wrong stays loud.
    (line,) = caplog.messages
    assert "not finished" in line
