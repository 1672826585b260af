"""The explicit forms for Hugging Face's Trainer, in this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import ds_compress
from ds_compress.engine.announce import announce_end
from ds_compress.engine.registry import keep
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, pruning_block
from tests.single import init_single_process


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    init_single_process()
    AcceleratorState._reset_state(True)  # a test of another file may have left its plugin
    yield
    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()


def data(rows: int = 16) -> list[dict[str, torch.Tensor]]:
    (batch,) = batches(1, size=rows)
    return [{name: values[row] for name, values in batch.items()} for row in range(rows)]


def arguments(folder: Path, block: dict[str, Any] | None, stage: int = 2, **extra: Any) -> TrainingArguments:
    config = ds_config(stage, block)
    settings = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4} | extra
    return TrainingArguments(
        output_dir=str(folder),
        deepspeed=config,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=1e-3,
        **{"save_strategy": "no"} | settings,
    )


def distillation_block(**extra: Any) -> dict[str, Any]:
    return {"distillation": {"enabled": True, "losses": {"logits": {"weight": 1.0}}, **extra}}


class Seen(TrainerCallback):
    """What a callback of `report_to` gets to see."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_import_alone_loads_no_trainer() -> None:
    program = (
        "import sys, ds_compress; print([m for m in ('transformers.trainer', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # DeepSpeed may print warnings before it.
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("first", [False, True])
def test_the_callback_adds_all_metrics_to_logs_and_history(tmp_path: Path, first: bool) -> None:
    seen = Seen()
    callbacks = [seen] if first else [ds_compress.CompressionCallback(), seen]
    trainer = Trainer(
        model=tiny_bert(),
        args=arguments(tmp_path, pruning_block(density=0.25, schedule_offset=3)),
        train_dataset=data(),
        callbacks=callbacks,
    )
    if first:
        ds_compress.CompressionCallback.add_to(trainer)
        callback = ds_compress.CompressionCallback.add_to(trainer)
        assert trainer.callback_handler.callbacks.count(callback) == 1
        assert trainer.callback_handler.callbacks[1] is callback  # behind the one that decides when to save
    trainer.train()
    key = "compression/sparse_pruning/sparsity"
    expected = [0.0, pytest.approx(0.75, abs=1e-3)]
    assert [entry[key] for entry in trainer.state.log_history if "loss" in entry] == expected
    assert [entry[key] for entry in seen.logs if "loss" in entry] == expected
    # The summary of the whole training is no log of a step.
    assert key not in trainer.state.log_history[-1]


def test_the_callback_joins_by_itself_before_those_of_report_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Seen()
    trainer = Trainer(
        model=tiny_bert(),
        args=arguments(tmp_path, pruning_block(density=0.25, schedule_offset=3)),
        train_dataset=data(),
        callbacks=[seen],
    )
    with caplog.at_level("INFO", "ds_compress"):
        trainer.train()
    key = "compression/sparse_pruning/sparsity"
    expected = [0.0, pytest.approx(0.75, abs=1e-3)]
    assert [entry[key] for entry in trainer.state.log_history if "loss" in entry] == expected
    assert [entry[key] for entry in seen.logs if "loss" in entry] == expected
    lines = [record.getMessage() for record in caplog.records if record.name == "ds_compress"]
    assert any(line.startswith("BertForSequenceClassification with ") for line in lines)
    assert [line for line in lines if line.startswith("after 4 steps, all as planned: ")]
    (result,) = [line for line in lines if line.startswith("  sparse_pruning/sparsity ")]
    assert result.split() == ["sparse_pruning/sparsity", "0.75", "planned", "0.75"]
    assert lines[-1].startswith("no checkpoint was saved") and "ds_compress.export(trainer, " in lines[-1]


def test_the_end_names_the_last_checkpoint_and_an_export_that_follows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(
        model=tiny_bert(),
        args=arguments(tmp_path / "out", pruning_block(density=0.25), save_strategy="steps", save_steps=2),
        train_dataset=data(),
    )
    with caplog.at_level("INFO", "ds_compress"):
        trainer.train()
        saved = tmp_path / "out" / "checkpoint-4" / "global_step4"
        assert saved.is_dir()
        assert caplog.messages[-1] == f"saved in {saved}; next: ds_compress export {saved} compressed"
        ds_compress.export(trainer, tmp_path / "small", check=False)
        announce_end(trainer.deepspeed.compression)
    assert (
        caplog.messages[-1]
        == f"exported to {tmp_path / 'small'}; next: ds_compress inspect {tmp_path / 'small'}"
    )
    assert len([line for line in caplog.messages if line.startswith("after ")]) == 1


def test_numbers_survive_a_shrink(tmp_path: Path) -> None:
    block = {
        "row_pruning": {
            "shared_parameters": {
                "enabled": True,
                "method": "l1",
                "dense_ratio": 0.5,
                "schedule_offset": 2,
                "shrink_at_end_of_schedule": True,
            }
        }
    }
    trainer = Trainer(
        model=tiny_bert(), args=arguments(tmp_path, block, logging_steps=1), train_dataset=data()
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = [{name for name in entry if name.startswith("compression/row_pruning")} for entry in logs]
    assert names[-1] and names[-1] == names[1]
    assert [logs[-1][name] for name in names[1]] == [logs[1][name] for name in names[1]]


def test_a_schedule_beyond_max_steps_is_refused_before_the_first_step(tmp_path: Path) -> None:
    block = pruning_block(schedule_offset_end=5)
    trainer = Trainer(model=tiny_bert(), args=arguments(tmp_path, block), train_dataset=data())
    with pytest.raises(ds_compress.ConfigError, match="4 optimizer steps") as caught:
        trainer.train()
    (problem,) = caught.value.problems
    assert problem.path == "compression_training.sparse_pruning.shared_parameters.schedule_offset_end"
    assert trainer.state.global_step == 0
    trainer = Trainer(model=tiny_bert(), args=arguments(tmp_path, block, max_steps=5), train_dataset=data())
    trainer.train()


def test_a_forgotten_use_cpu_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(model=tiny_bert(), args=arguments(tmp_path, pruning_block()), train_dataset=data())
    monkeypatch.setenv("WORLD_SIZE", "2")  # what the launcher says; this Trainer believes that it is alone
    callback = ds_compress.CompressionCallback.add_to(trainer)
    keep(trainer.model, Attached())
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert "use_cpu" in caplog.text


class Attached:
    engine = None
    at_release: ClassVar[list[Any]] = []


def test_the_callback_is_silent_without_a_block(tmp_path: Path) -> None:
    trainer = Trainer(
        model=tiny_bert(),
        args=arguments(tmp_path, None),
        train_dataset=data(),
        callbacks=[ds_compress.CompressionCallback()],
    )
    trainer.train()
    assert not any(key.startswith("compression") for entry in trainer.state.log_history for key in entry)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_teacher_object_is_imitated_as_the_named_one_is(tmp_path: Path, stage: int) -> None:
    teacher = tiny_bert(seed=3)
    teacher.save_pretrained(tmp_path / "teacher")
    histories = []
    named = arguments(tmp_path, distillation_block(teacher=str(tmp_path / "teacher")), stage, logging_steps=1)
    trainer = Trainer(
        model=tiny_bert(), args=named, train_dataset=data(), callbacks=[ds_compress.CompressionCallback()]
    )
    trainer.train()
    histories.append(trainer.state.log_history)
    given = arguments(tmp_path, distillation_block(), stage, logging_steps=1)
    trainer = ds_compress.DistillationTrainer(
        model=tiny_bert(), args=given, train_dataset=data(), teacher=teacher
    )
    trainer.train()
    histories.append(trainer.state.log_history)
    key = "compression/distillation/logits"
    ours, theirs = ([(e["loss"], e[key]) for e in history if "loss" in e] for history in histories)
    assert len(ours) == 4
    assert all(value > 0 for _, value in ours)
    assert ours == theirs


@pytest.mark.parametrize("block", [pruning_block(), distillation_block(enabled=False), None])
def test_a_teacher_without_a_distillation_block_is_refused(tmp_path: Path, block: Any) -> None:
    with pytest.raises(ds_compress.ConfigError, match=r"compression_training\.distillation"):
        ds_compress.DistillationTrainer(
            model=tiny_bert(), args=arguments(tmp_path, block), train_dataset=data(), teacher=tiny_bert()
        )


def test_a_teacher_without_deepspeed_is_refused(tmp_path: Path) -> None:
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ds_compress.ConfigError, match=r"TrainingArguments\.deepspeed"):
        ds_compress.DistillationTrainer(
            model=tiny_bert(), args=plain, train_dataset=data(), teacher=tiny_bert()
        )
