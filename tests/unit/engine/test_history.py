"""The numbers that a run keeps: bounded, evenly spaced, and the same after a resumption as without one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_compress
from ds_compress.engine.history import CAPACITY, MOST_NAMES, History
from ds_compress.export import run_record
from ds_compress.export.report import ExportReport
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, pruning_block, structured_block, train
from tests.multirank.training import quantization_block

RAMP = pruning_block("l1", 0.25, schedule="cubic", schedule_offset=2, schedule_offset_end=8)


@pytest.mark.parametrize("steps", [1, CAPACITY, CAPACITY + 1, 5000])
def test_points_are_bounded_and_evenly_spaced(steps: int) -> None:
    history = History()
    for step in range(1, steps + 1):
        if history.is_due(step):
            history.add(step, {"a/b": float(step)})
    data = history.as_data()
    assert data["steps"] == list(range(data["stride"], steps + 1, data["stride"]))
    assert min(steps, CAPACITY // 2) <= len(data["steps"]) <= CAPACITY
    assert data["numbers"] == {"a/b": [float(step) for step in data["steps"]]}


def test_the_last_point_is_shown_and_not_kept() -> None:
    history = History()
    history.stride = 4
    history.add(4, {"a": 1.0})
    assert history.as_data(6, {"a": 2.0, "b": torch.tensor(3.0)})["numbers"] == {
        "a": [1.0, 2.0],
        "b": [None, 3.0],
    }
    assert history.as_data()["steps"] == [4]
    assert history.as_data(4, {"a": 9.0})["numbers"] == {"a": [1.0]}


def test_numbers_that_json_has_not_come_back() -> None:
    history, again = History(), History()
    history.add(1, {"loss": math.nan, "norm": -math.inf})
    history.add(2, {"loss": 0.5})
    again.load(json.loads(json.dumps(history.as_data(), allow_nan=False)))
    assert again.as_data() == history.as_data()
    assert history.as_data()["numbers"] == {"loss": ["nan", 0.5], "norm": ["-inf", None]}


def test_names_are_bounded_and_what_is_left_out_is_counted() -> None:
    history = History()
    history.add(1, {f"worker/{k}": 1.0 for k in range(MOST_NAMES + 7)})
    data = history.as_data(2, {f"worker/{k}": 1.0 for k in range(MOST_NAMES + 7)})
    assert len(data["numbers"]) == MOST_NAMES and data["left_out"] == 7


def test_a_tensor_is_kept_as_it_was() -> None:
    history, value = History(), torch.tensor(1.0)
    history.add(1, {"loss": value})
    value.fill_(7.0)
    assert history.as_data()["numbers"] == {"loss": [1.0]}


def recorded(folder: Path) -> dict[str, Any]:
    found = run_record.read(folder / "ds_compress" / "run.json")
    assert found is not None
    return found


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("stage", [0, 3])
def test_a_resumed_run_goes_on_with_its_history(stage: int, tmp_path: Path) -> None:
    config = ds_config(stage, RAMP)
    data = list(batches(9))
    with engine_of(tiny_bert(), config) as engine:
        losses = train(engine, iter(data))
        engine.save_checkpoint(str(tmp_path), tag="whole")
    with engine_of(tiny_bert(), config) as engine:
        train(engine, iter(data[:5]))
        engine.save_checkpoint(str(tmp_path), tag="half")
    with engine_of(tiny_bert(seed=3), config) as engine:
        train(engine, iter(data[:2]))
        engine.load_checkpoint(str(tmp_path), tag="half")
        train(engine, iter(data[5:]))
        engine.save_checkpoint(str(tmp_path), tag="resumed")
    whole, resumed = recorded(tmp_path / "whole"), recorded(tmp_path / "resumed")
    assert resumed["history"] == whole["history"]
    numbers = whole["history"]["numbers"]
    assert whole["history"]["steps"] == list(range(1, 10))
    assert numbers["training/loss"] == pytest.approx(losses)
    # Every step is due (a stride of 1), so that what is reached is what is planned, up to the rounding of counts.
    assert numbers["sparse_pruning/sparsity"] == pytest.approx(
        numbers["sparse_pruning/planned_sparsity"], abs=2e-3
    )
    assert numbers["sparse_pruning/sparsity"][0] == 0 and numbers["sparse_pruning/sparsity"][-1] > 0.7
    assert (whole["processes"], whole["zero_stage"], whole["applied_steps"]) == (1, stage, 9)


@pytest.mark.usefixtures("single_process")
def test_a_checkpoint_without_a_record_or_with_a_damaged_one_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with engine_of(tiny_bert(), ds_config(0, RAMP)) as engine:
        train(engine, batches(3))
        engine.save_checkpoint(str(tmp_path), tag="t")
        path = tmp_path / "t" / "ds_compress" / "run.json"
        (tmp_path / "t" / "ds_compress_manifest.json").unlink()
        for damage in (
            None,
            '{"format": 1}',
            "[",
            '{"format": 1, "history": {"steps": [1]}}',
            '{"format": 9}',
        ):
            caplog.clear()
            path.unlink(missing_ok=True)
            if damage is not None:
                path.write_text(damage)
            from ds_compress.engine import record

            record.restore(path.parent, engine.compression)
            assert engine.compression.history.as_data()["steps"] == []
            assert ("begins anew" in caplog.text) == (damage is not None)


@pytest.mark.usefixtures("single_process")
def test_a_run_that_shrinks_keeps_its_history(tmp_path: Path) -> None:
    shared = structured_block(schedule_offset_end=3, schedule="linear", shrink_at_end_of_schedule=True)
    groups = {"ffn": {"params": {"dense_ratio": 0.5}, "modules": ["intermediate"]}}
    shared["shared_parameters"].pop("dense_ratio")
    block = {"row_pruning": {**shared, "different_groups": groups}}
    with engine_of(tiny_bert(), ds_config(0, block)) as engine:
        train(engine, batches(6))
        engine.save_checkpoint(str(tmp_path), tag="t")
    history = recorded(tmp_path / "t")["history"]
    assert history["steps"] == list(range(1, 7))
    numbers = history["numbers"]
    assert numbers["row_pruning/density"] == pytest.approx([1.0, 0.75, 0.5, 0.5, 0.5, 0.5], abs=0.02)
    assert numbers["row_pruning/planned_density"][:3] == pytest.approx([1.0, 0.75, 0.5])
    assert numbers["row_pruning/planned_density"][-1] is None, "the plan is done"


@pytest.mark.usefixtures("single_process")
def test_a_checkpoint_of_plain_deepspeed_clears_the_history(tmp_path: Path) -> None:
    with engine_of(tiny_bert(), ds_config(0)) as engine:
        train(engine, batches(2))
        engine.save_checkpoint(str(tmp_path), tag="plain")
    with engine_of(tiny_bert(), ds_config(0, RAMP)) as engine:
        train(engine, batches(2))
        engine.load_checkpoint(str(tmp_path), tag="plain")
        assert engine.compression.history.as_data()["steps"] == []


@pytest.mark.usefixtures("single_process")
def test_exports_of_an_engine_a_checkpoint_and_a_finished_model_have_it(tmp_path: Path) -> None:
    block = {**RAMP, **quantization_block(), "security": {"verify": "off", "trust_pickle": True}}
    with engine_of(tiny_bert(), ds_config(0, block)) as engine:
        train(engine, batches(8))
        engine.save_checkpoint(str(tmp_path / "run"))
        ds_compress.export(engine, tmp_path / "engine", check=False)
        model = ds_compress.finalize(engine)
        ds_compress.export(model, tmp_path / "finished", check=False)
    ds_compress.export(tmp_path / "run", tmp_path / "checkpoint", check=False)
    records = [
        run_record.read(tmp_path / name / "ds_compress_run.json")
        for name in ("engine", "checkpoint", "finished")
    ]
    assert records[0] is not None and records[0]["history"]["steps"] == list(range(1, 9))
    assert records[0] == records[1] == records[2]
    text = (tmp_path / "engine" / "ds_compress_run.json").read_text()
    assert "security" not in text
    assert "mean_bits" in text and ExportReport.read(tmp_path / "engine").steps == 8
    # Of its own files the checkpoint keeps all.
    assert recorded(next((tmp_path / "run").glob("global_step*")))["compression_training"]["security"]


def test_what_is_given_away_has_no_path_and_no_seed(tmp_path: Path) -> None:
    teacher = {"teacher": "/home/me/models/big", "paths": ["C:\\me\\x", "org/name"], "seed": 7}
    run_record.write(
        tmp_path, {"format": 1, "compression_training": {"a": teacher, "security": {"public_key": "k"}}}
    )
    found = run_record.read(tmp_path / "ds_compress_run.json")
    assert found is not None
    assert found["compression_training"] == {"a": {"teacher": "big", "paths": ["x", "org/name"]}}
