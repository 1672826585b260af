"""How a teacher joins the loss of a training step, and which teachers are refused at start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.config.schema.distillation import AttentionLoss, HiddenLoss, LogitsLoss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.losses.attention import RelationDistillation
from ds_compress.distill.losses.base import ModelPair
from ds_compress.distill.losses.hidden import HiddenDistillation
from ds_compress.distill.losses.logits import LogitsDistillation
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config
from tests.unit.distill.oracle import kl

pytestmark = pytest.mark.usefixtures("single_process")


def test_identical_models_lose_nothing() -> None:
    x = torch.randn(2, 3, 8)
    record = CapturedActivations(logits=x, hidden=[x], relations=[(x, x, x)])
    for loss in (
        LogitsDistillation(LogitsLoss()),
        HiddenDistillation(HiddenLoss()),
        RelationDistillation(AttentionLoss(), ModelPair(heads=2)),
    ):
        assert abs(float(loss(record, record))) < 1e-6


def engine_with_teacher(
    task_loss_weight: float = 1.0, stage: int = 0, **losses: Any
) -> tuple[Any, nn.Module, nn.Module]:
    block = {"distillation": {"enabled": True, "task_loss_weight": task_loss_weight, "losses": losses}}
    student, teacher = tiny_bert(seed=1), tiny_bert(seed=2)
    engine, *_ = ds_compress.initialize(
        model=student, model_parameters=student.parameters(), config=ds_config(stage, block), teacher=teacher
    )
    return engine, student, teacher


def test_the_gradient_is_that_of_the_weighted_sum() -> None:
    engine, student, teacher = engine_with_teacher(0.25, logits={"weight": 3.0, "temperature": 2.0})
    (batch,) = batches(1)
    engine.backward(engine(**batch).loss)
    got = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    reference = tiny_bert(seed=1)
    output = reference(**batch)
    with torch.no_grad():
        theirs = teacher(**{k: v for k, v in batch.items() if k != "labels"}).logits
    total = (
        0.25 * output.loss + 3.0 * 4.0 * kl((theirs / 2).softmax(-1), (output.logits / 2).softmax(-1)).mean()
    )
    total.backward()
    for name, p in reference.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)
    engine.destroy()


def test_a_loss_of_the_scripts_own_is_distilled_too() -> None:
    engine, _, _ = engine_with_teacher(logits={})
    (batch,) = batches(1)
    labels = batch.pop("labels")
    engine.backward(nn.functional.cross_entropy(engine(**batch).logits, labels))
    assert engine.compression.metrics()["distillation/logits"] > 0
    engine.step()
    engine.destroy()


def test_a_backward_that_bypasses_the_teacher_is_an_error() -> None:
    engine, _, _ = engine_with_teacher(stage=1, logits={})
    (batch,) = batches(1)
    engine(**batch).loss.backward()
    with pytest.raises(RuntimeError, match=r"engine\.backward\(loss\)"):
        engine.step()
    engine.destroy()


def test_evaluation_between_steps_changes_nothing() -> None:
    losses = []
    for evaluates in (False, True):
        engine, _, _ = engine_with_teacher(logits={})
        for batch in batches(3):
            if evaluates:
                engine.eval()
                engine(**batch)
                with torch.no_grad():
                    engine(**batch)
                engine.train()
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
        engine.destroy()
    assert losses[:3] == losses[3:]


@pytest.mark.parametrize(
    ("teacher", "losses", "message"),
    [
        (lambda: tiny_bert(heads=2), {"attention": {"kind": "maps"}}, "between 4 and 2 heads"),
        (lambda: tiny_bert(labels=5), {"logits": {}}, "5 classes"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_at_start(teacher: Any, losses: Any, message: str) -> None:
    student = tiny_bert()
    block = {"distillation": {"enabled": True, "losses": losses}}
    with pytest.raises(ds_compress.ConfigError, match=message):
        ds_compress.initialize(
            model=student,
            model_parameters=student.parameters(),
            config=ds_config(0, block),
            teacher=teacher(),
        )


@pytest.mark.parametrize(
    ("teacher", "message"), [(None, "ds_compress.initialize"), ("no/such/folder", "an existing folder")]
)
def test_a_missing_teacher_is_refused_at_start(teacher: str | None, message: str) -> None:
    student = tiny_bert()
    block = (
        {"distillation": {"enabled": True, "teacher": teacher}}
        if teacher
        else {"distillation": {"enabled": True}}
    )
    with pytest.raises(ds_compress.ConfigError, match=message):
        deepspeed.initialize(model=student, model_parameters=student.parameters(), config=ds_config(0, block))


@pytest.mark.parametrize("block", [None, {"distillation": {"enabled": False}}])
def test_a_teacher_that_nothing_uses_is_an_error(block: dict[str, Any] | None) -> None:
    student = tiny_bert()
    with pytest.raises(ds_compress.ConfigError, match="teacher"):
        ds_compress.initialize(
            model=student,
            model_parameters=student.parameters(),
            config=ds_config(0, block),
            teacher=tiny_bert(),
        )


def test_the_student_cannot_teach_itself() -> None:
    student = tiny_bert()
    with pytest.raises(ds_compress.ConfigError, match="another model object"):
        ds_compress.initialize(
            model=student,
            model_parameters=student.parameters(),
            config=ds_config(0, {"distillation": {"enabled": True}}),
            teacher=student,
        )


@pytest.mark.parametrize(("seed", "warns"), [(2, False), (3, True)])
def test_a_resumed_run_with_another_teacher_is_told(
    seed: int, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, *_ = engine_with_teacher(logits={})
    engine.save_checkpoint(str(tmp_path))
    student, block = tiny_bert(seed=1), {"distillation": {"enabled": True, "losses": {"logits": {}}}}
    config = ds_config(0, block)
    resumed, *_ = ds_compress.initialize(
        model=student, model_parameters=student.parameters(), config=config, teacher=tiny_bert(seed=seed)
    )
    resumed.load_checkpoint(str(tmp_path))
    assert ("the teacher is not the one" in caplog.text) is warns
    engine.destroy()
    resumed.destroy()
