"""Mixtures of experts as teachers and students: what a model adds to its loss for balance is no imitation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ds_compress
from tests.models import tiny_llama
from tests.multirank.common import ds_config
from tests.zoo.mixtures import VOCABULARY, mixture, tokens

pytestmark = pytest.mark.usefixtures("single_process")


def imitation(student: nn.Module, teacher: nn.Module, **changes: Any) -> tuple[float, dict[str, float]]:
    """The loss that a label-free forward returns, and the metrics after one step."""
    block = {"distillation": {"enabled": True, "task_loss_weight": 0.0, "losses": {"logits": {}}, **changes}}
    engine, *_ = ds_compress.initialize(
        model=student,
        model_parameters=student.parameters(),
        config=ds_config(2, block),
        teacher=teacher,
    )
    loss = engine(input_ids=tokens(), labels=tokens()).loss
    engine.backward(loss)
    engine.step()
    metrics = engine.compression.metrics()
    engine.destroy()
    return loss.item(), metrics


@torch.no_grad()
def divergence(student: nn.Module, teacher: nn.Module) -> float:
    own, theirs = (F.log_softmax(model(input_ids=tokens()).logits, dim=-1) for model in (student, teacher))
    return F.kl_div(own, theirs, log_target=True, reduction="none").sum(-1).mean().item()


@pytest.mark.parametrize("output_router_logits", [False, True])
def test_the_balance_of_experts_is_no_part_of_the_imitation(output_router_logits: bool) -> None:
    student, teacher = (
        mixture("mixtral", seed, output_router_logits=output_router_logits) for seed in (1, 0)
    )
    expected = divergence(student, teacher)
    found, _ = imitation(student.train(), teacher)
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_task_of_the_model_keeps_its_balance() -> None:
    """With labels the loss that the script sees is the model's own, auxiliary loss included."""
    student, teacher = (mixture("mixtral", seed, output_router_logits=True) for seed in (1, 0))
    with torch.no_grad():
        own = student(input_ids=tokens(), labels=tokens())
    assert own.aux_loss > 0
    found, _ = imitation(student.train(), teacher, task_loss_weight=1.0)
    assert found == pytest.approx(own.loss.item(), rel=1e-5)


@pytest.mark.parametrize("experts", [2, 8])
def test_student_and_teacher_may_differ_in_experts(experts: int) -> None:
    student, teacher = mixture("qwen3_moe", 1, num_experts=experts), mixture("qwen3_moe")
    expected = divergence(student, teacher)
    assert imitation(student.train(), teacher)[0] == pytest.approx(expected, rel=1e-4)


def test_a_dense_model_learns_from_a_mixture() -> None:
    student = tiny_llama(hidden=16, heads=2, intermediate=24, vocab_size=VOCABULARY)
    teacher = mixture("gpt_oss")
    expected = divergence(student.eval(), teacher)
    assert imitation(student.train(), teacher)[0] == pytest.approx(expected, rel=1e-4)
