"""What a teacher may share with its student, and what has to follow: buffers, modes, one sharding for two students."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ds_compress
from tests.multirank.distilling import llama, token_batches
from tests.unit.engine.teachers.engines import engine_of

pytestmark = pytest.mark.usefixtures("single_process")


def distillation(**settings: Any) -> dict[str, Any]:
    return {"distillation": {"enabled": True, "losses": {"logits": {}}, **settings}}


class Normalized(nn.Module):
    """A classifier with a BatchNorm, of inputs far from the mean that it begins with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.stack = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        hidden = self.norm(self.first(x))
        for layer in self.stack:
            hidden = layer(hidden)
        logits = self.head(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def examples(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "x": 100 + 20 * torch.randn((8, 8), generator=generator),
        "labels": torch.randint(0, 3, (8,), generator=generator),
    }


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_buffers_of_an_average_follow_the_student(stage: int) -> None:
    block = distillation(self_teacher={"weights": "ema", "decay": 0.9})
    model = Normalized()
    with engine_of(model, block, stage=stage) as engine:
        teacher = engine.compression.teacher
        for step in range(8):
            engine.backward(engine(**examples(step)).loss)
            engine.step()
        assert float(model.norm.running_mean.abs().max()) > 10, "the control: there is something to follow"
        x = examples(99)["x"]
        theirs = teacher.forward(x).logits
        engine.eval()
        with torch.no_grad():
            ours = engine(x).logits
        own = dict(model.named_buffers())
        assert own and all(torch.equal(b, own[name]) for name, b in teacher.model.named_buffers())
        assert teacher.model.norm.num_batches_tracked == 8
        assert float(theirs.abs().max()) < 3 * float(ours.abs().max())


def test_a_copied_layer_brings_its_buffers_and_so_do_all_other_modules() -> None:
    teacher = Normalized()
    for step in range(4):
        teacher(examples(step)["x"])
    teacher.eval()
    student = Normalized()
    student.stack = student.stack[:1]
    reduction = {"enabled": True, "keep_number_layer": 1, "module_name_prefix": "stack", "teacher_layer": [1]}
    expected = {name: b.clone() for name, b in teacher.named_buffers()}
    with engine_of(student, {"layer_reduction": reduction}, teacher=teacher):
        assert torch.equal(student.stack[0][1].running_mean, expected["stack.1.1.running_mean"])
        assert torch.equal(student.stack[0][1].running_var, expected["stack.1.1.running_var"])
        assert torch.equal(student.norm.running_mean, expected["norm.running_mean"])
        assert student.norm.num_batches_tracked == 4


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("how", ["module", "parameter", "memory"])
def test_a_student_that_would_train_the_teachers_weights_is_refused(stage: int, how: str) -> None:
    teacher, student = llama(layers=3, tied=False), llama(seed=1, tied=False)
    if how == "module":
        student.lm_head = teacher.lm_head
    elif how == "parameter":
        student.lm_head.weight = teacher.lm_head.weight
    else:
        student.lm_head.weight.data = teacher.lm_head.weight.data
    with pytest.raises(ds_compress.ConfigError, match="is the student's") as error:
        engine_of(student, distillation(), teacher, stage).__enter__()
    (problem,) = error.value.problems
    assert problem.path == "compression_training.distillation.teacher"
    assert "lm_head" in problem.got
    assert student.lm_head.weight.requires_grad and teacher.lm_head.weight.requires_grad


def test_layers_are_not_taken_from_the_student_itself() -> None:
    student = Normalized()
    reduction = {"enabled": True, "keep_number_layer": 1, "module_name_prefix": "stack"}
    with pytest.raises(ds_compress.ConfigError, match="another model object"):
        engine_of(student, {"layer_reduction": reduction}, student).__enter__()
    assert all(p.requires_grad for p in student.parameters())


def test_what_both_have_may_be_frozen_in_the_student_or_copied() -> None:
    teacher, student = llama(layers=3, tied=False), llama(seed=1, tied=False)
    student.lm_head = teacher.lm_head
    student.lm_head.requires_grad_(False)
    with engine_of(student, distillation(), teacher) as engine:
        before = student.model.embed_tokens.weight.detach().clone()
        for batch in token_batches(2):
            engine.backward(engine(**batch).loss)
            engine.step()
        assert not torch.equal(before, student.model.embed_tokens.weight)
    same = llama()
    with engine_of(same, distillation(), copy.deepcopy(same)) as engine:
        assert all(p.requires_grad for p in same.parameters())


@pytest.mark.parametrize("teacher_stage", [0, 3])
def test_two_students_learn_from_one_teacher(teacher_stage: int) -> None:
    block = distillation(teacher_zero_stage=teacher_stage)
    alone = []
    for seed in (1, 2):
        with engine_of(llama(seed=seed), block, llama(layers=3), stage=1) as engine:
            alone.append([float(engine(**batch).loss) for batch in token_batches(2)])
    teacher = llama(layers=3)
    with (
        engine_of(llama(seed=1), block, teacher, stage=1) as first,
        engine_of(llama(seed=2), block, teacher, stage=1) as second,
    ):
        together: list[list[float]] = [[], []]
        for batch in token_batches(2):
            for losses, engine in zip(together, (first, second), strict=True):
                losses.append(float(engine(**batch).loss))
    assert together == alone


@pytest.mark.parametrize("teacher_stage", [0, 3])
def test_a_teacher_answers_in_eval_mode_whatever_its_owner_sets(teacher_stage: int) -> None:
    teacher = Normalized()
    student = Normalized()
    with engine_of(student, distillation(teacher_zero_stage=teacher_stage), teacher) as engine:
        batch = examples(0)
        kept = {name: b.clone() for name, b in teacher.named_buffers()}
        quiet = engine.compression.teacher.forward(batch["x"]).logits
        teacher.train()
        assert torch.equal(engine.compression.teacher.forward(batch["x"]).logits, quiet)
        engine.backward(engine(**batch).loss)
        engine.step()
        assert all(torch.equal(kept[name], b) for name, b in teacher.named_buffers())
        assert teacher.training, "the owner's own mode is given back"
