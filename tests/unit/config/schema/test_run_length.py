"""A schedule that the run cannot finish: an error where the length is known, a line where it is not."""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import pytest
import torch

import ds_compress
from ds_compress import ConfigError, parse_config
from ds_compress.config.schema.run_length import schedule_ends, unfinished, unfinished_line
from ds_compress.engine import run_end
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, pruning_block, train

pytestmark = pytest.mark.usefixtures("single_process")


def bits(start: int, target: int, period: int, **shared: Any) -> dict[str, Any]:
    params = {"start_bits": start, "target_bits": target, "quantization_period": period}
    group = {"g": {"params": params, "modules": ["intermediate"]}}
    return {
        "weight_quantization": {"shared_parameters": {"enabled": True, **shared}, "different_groups": group}
    }


def rows(**shared: Any) -> dict[str, Any]:
    return {
        "row_pruning": {"shared_parameters": {"enabled": True, "method": "l1", "dense_ratio": 0.5, **shared}}
    }


ENDS = [
    (pruning_block(), "sparse_pruning.shared_parameters.schedule_offset", 1),
    (pruning_block(schedule_offset=7), "sparse_pruning.shared_parameters.schedule_offset", 7),
    (pruning_block(schedule_offset_end=9), "sparse_pruning.shared_parameters.schedule_offset_end", 9),
    (rows(schedule_offset=5), "row_pruning.shared_parameters.schedule_offset", 5),
    (rows(schedule_offset=0, schedule_offset_end=8), "row_pruning.shared_parameters.schedule_offset_end", 8),
    (bits(8, 8, 4, schedule_offset=6), "weight_quantization.shared_parameters.schedule_offset", 6),
    (
        bits(8, 4, 2, schedule_offset=3),
        "weight_quantization.different_groups.g.params.quantization_period",
        3 + 2 * 8,
    ),
    (
        {"gradient_compression": {"enabled": True, "warmup_steps": 4}},
        "gradient_compression.warmup_steps",
        5,
    ),
]


@pytest.mark.parametrize(("block", "path", "step"), ENDS)
def test_where_a_schedule_ends(block: dict[str, Any], path: str, step: int) -> None:
    (end,) = schedule_ends(parse_config(block))
    assert (end.path, end.step) == (f"compression_training.{path}", step)


def test_the_end_is_the_step_at_which_the_weights_are_what_they_will_be() -> None:
    """`step` against the truth: the first number of applied steps after which the sparsity is the final one."""
    block = pruning_block(density=0.3, schedule_offset=2, schedule_offset_end=5)
    (end,) = schedule_ends(parse_config(block))
    with engine_of(tiny_bert(), ds_config(0, block)) as engine:
        weight = engine.module.bert.encoder.layer[0].intermediate.dense.weight
        zeros = []
        for batch in batches(7):
            train(engine, iter([batch]))
            zeros.append(float((weight == 0).float().mean()))
    assert zeros.index(max(zeros)) + 1 == end.step == 5


def test_the_end_of_a_ladder_of_bits_is_where_the_target_is_reached() -> None:
    block = bits(6, 4, 2, schedule_offset=1)
    (end,) = schedule_ends(parse_config(block))
    with engine_of(tiny_bert(), ds_config(0, block)) as engine:
        mean_bits = []
        for batch in batches(7):
            train(engine, iter([batch]))
            mean_bits.append(engine.compression.metrics()["weight_quantization/mean_bits"])
    assert mean_bits.index(4) + 1 == end.step == 5


def test_disabled_blocks_have_no_end() -> None:
    block = pruning_block(schedule_offset_end=9)
    block["sparse_pruning"]["shared_parameters"]["enabled"] = False
    assert list(schedule_ends(parse_config(block))) == []


@pytest.mark.parametrize(("total", "refused"), [(8, True), (9, False)])
def test_a_scheduler_that_knows_its_length(total: int, refused: bool) -> None:
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": total, "warmup_num_steps": 2}}
    config = ds_config(1, pruning_block(schedule_offset_end=9), scheduler=scheduler)
    model = tiny_bert()
    if not refused:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        engine.destroy()
        return
    with pytest.raises(ConfigError) as caught:
        deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    (problem,) = caught.value.problems
    assert problem.path.endswith("schedule_offset_end")
    assert "8 optimizer steps" in problem.allowed and "WarmupDecayLR" in problem.allowed


def test_a_scheduler_of_torch_that_knows_its_length() -> None:
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=8)
    config = ds_config(0, pruning_block(schedule_offset_end=9))
    del config["optimizer"]
    with pytest.raises(ConfigError, match="OneCycleLR"):
        deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)


def test_every_last_call_says_so_once(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    block = pruning_block(schedule_offset_end=9)
    for last in ("save_checkpoint", "save_16bit_model", "export", "finalize", "destroy", "exit"):
        caplog.clear()
        run_end._running.clear()  # engines that other tests left behind would say so at the exit, too
        engine, *_ = deepspeed.initialize(
            model=(model := tiny_bert()), model_parameters=model.parameters(), config=ds_config(1, block)
        )
        train(engine, batches(3))
        calls: dict[str, Any] = {
            "export": lambda engine=engine: ds_compress.export(engine, tmp_path / "out", check=False),
            "finalize": lambda engine=engine: ds_compress.finalize(engine),
            "exit": run_end._at_exit,
            "destroy": engine.destroy,
            "save_checkpoint": lambda engine=engine: engine.save_checkpoint(str(tmp_path / "checkpoint")),
            "save_16bit_model": lambda engine=engine: engine.save_16bit_model(str(tmp_path)),
        }
        calls[last]()
        calls["exit"]()
        lines = [r.getMessage() for r in caplog.records if "not finished" in r.getMessage()]
        assert len(lines) == 1, last
        assert "3 optimizer steps" in lines[0] and "sparse_pruning (step 9)" in lines[0]
        engine.destroy()


def test_a_finished_run_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with engine_of(tiny_bert(), ds_config(1, pruning_block(schedule_offset_end=3))) as engine:
        train(engine, batches(3))
        run_end._running.intersection_update({engine.compression})
        run_end._at_exit()
    assert not [r for r in caplog.records if "not finished" in r.getMessage()]


def test_an_engine_gets_its_methods_back() -> None:
    with engine_of(tiny_bert(), ds_config(1, pruning_block())) as engine:
        engine.compression.detach()
        assert not {"destroy", "save_16bit_model", "save_checkpoint"} & set(vars(engine))


def test_the_line_names_the_latest_end_of_each_block() -> None:
    block = {**bits(8, 4, 2), **pruning_block(schedule_offset_end=50)}
    config = parse_config(block)
    assert {end.block for end in unfinished(config, 16)} == {"sparse_pruning"}
    line = unfinished_line(config, 10)
    assert line is not None and "sparse_pruning (step 50), weight_quantization (step 16)" in line
    assert unfinished_line(config, 50) is None


def test_several_processes_that_train_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with caplog.at_level(logging.WARNING), engine_of(tiny_bert(), ds_config(1, pruning_block())):
        pass
    assert "use_cpu" in caplog.text
