"""Distillation losses against their definitions in float64, and the seam of the loss."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.config.schema.distillation import AttentionLoss, HiddenLoss, LogitsLoss
from ds_compress.distill.activation_capture import ActivationCapture, CapturedActivations
from ds_compress.distill.losses.attention import RelationDistillation
from ds_compress.distill.losses.base import ModelPair
from ds_compress.distill.losses.hidden import HiddenDistillation
from ds_compress.distill.losses.logits import LogitsDistillation
from ds_compress.distill.projections import find_projections
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config

pytestmark = pytest.mark.usefixtures("single_process")


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the last axis of two tensors of probabilities."""
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_loss_is_hintons(temperature: float) -> None:
    own, theirs = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    expected = kl((theirs / temperature).softmax(-1), (own / temperature).softmax(-1)).mean() * temperature**2
    got = LogitsDistillation(LogitsLoss(temperature=temperature))(
        CapturedActivations(logits=own), CapturedActivations(logits=theirs)
    )
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_logits_of_padding_do_not_count_and_padded_vocabularies_are_cut() -> None:
    own, theirs = torch.randn(2, 3, 5), torch.randn(2, 3, 8)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    got = LogitsDistillation(LogitsLoss())(
        CapturedActivations(logits=own, token_mask=mask), CapturedActivations(logits=theirs)
    )
    rows = kl(theirs[..., :5].double().softmax(-1), own.double().softmax(-1))[mask]
    assert float(got) == pytest.approx(float(rows.mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_loss(kind: Any) -> None:
    own, theirs = [torch.randn(2, 3, 4) for _ in range(2)], [torch.randn(2, 3, 4) for _ in range(2)]
    mask = torch.tensor([[True, True, False], [True, True, True]])
    expected = []
    for a, b in zip(own, theirs, strict=True):
        a, b = a.double()[mask], b.double()[mask]
        cosine = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
        expected.append(((a - b) ** 2).mean() if kind == "mse" else (1 - cosine).mean())
    loss = HiddenDistillation(HiddenLoss(kind=kind))
    got = loss(CapturedActivations(hidden=own, token_mask=mask), CapturedActivations(hidden=theirs))
    assert float(got) == pytest.approx(float(sum(expected) / 2), rel=1e-5)


def test_attention_loss_compares_relations_of_any_width() -> None:
    own = [tuple(torch.randn(1, 4, 6) for _ in range(3))]
    theirs = [tuple(torch.randn(1, 4, 10) for _ in range(3))]

    def relation(x: torch.Tensor, heads: int) -> torch.Tensor:
        split = x.double().view(1, 4, heads, -1).transpose(1, 2)
        return (split @ split.transpose(2, 3) / math.sqrt(split.shape[-1])).softmax(-1)

    expected = (
        sum(kl(relation(b, 2), relation(a, 2)).mean() for a, b in zip(own[0], theirs[0], strict=True)) / 3
    )
    got = RelationDistillation(AttentionLoss(), ModelPair(heads=2))(
        CapturedActivations(relations=own), CapturedActivations(relations=theirs)
    )
    assert float(got) == pytest.approx(float(expected), rel=1e-4)


def test_attention_to_padding_does_not_count() -> None:
    mask = torch.tensor([[True, True, False]])
    own, theirs = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    changed = own.clone()
    changed[:, 2] += 100.0
    loss = RelationDistillation(AttentionLoss(), ModelPair(heads=2))
    a, b = (
        loss(
            CapturedActivations(relations=[(x,) * 3], token_mask=mask),
            CapturedActivations(relations=[(theirs,) * 3]),
        )
        for x in (own, changed)
    )
    torch.testing.assert_close(a, b)


def test_identical_models_lose_nothing() -> None:
    x = torch.randn(2, 3, 8)
    record = CapturedActivations(logits=x, hidden=[x], relations=[(x, x, x)])
    for loss in (
        LogitsDistillation(LogitsLoss()),
        HiddenDistillation(HiddenLoss()),
        RelationDistillation(AttentionLoss(), ModelPair(heads=2)),
    ):
        assert abs(float(loss(record, record))) < 1e-6


def test_projections_are_found_by_family() -> None:
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    bert = transformers.BertModel(transformers.BertConfig(**small, vocab_size=9)).encoder.layer[0]
    assert find_projections(bert)[0] is bert.attention.self.query
    llama = transformers.LlamaModel(
        transformers.LlamaConfig(**small, num_key_value_heads=1, vocab_size=9)
    ).layers[0]
    assert find_projections(llama)[2] is llama.self_attn.v_proj
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9)).h[0]
    assert find_projections(gpt2) == [gpt2.attn.c_attn]
    with pytest.raises(ds_compress.ConfigError, match="Sequential"):
        find_projections(nn.Sequential(nn.Linear(2, 2)))


def test_nothing_is_recorded_outside_the_window() -> None:
    layer = nn.Linear(2, 2)
    recorder = ActivationCapture([layer], [0], {"hidden"})
    recorder.start()
    layer(torch.ones(1, 2))
    assert len(recorder.finish().hidden) == 1
    layer(torch.ones(1, 2))
    assert recorder.finish().hidden == []


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
