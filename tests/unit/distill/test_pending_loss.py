"""The loss of the teacher beside the cross entropy, against a plain model: values and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.lazy_logits import LazyLogits
from tests.unit.distill.lazy import (
    ALL_IN_ONE,
    KD,
    MODELS,
    ROWS,
    VOCABULARY,
    assert_same_gradients,
    batch_of,
    gradients,
    lazy,
    made,
    plain_run,
    teacher_logits,
)


@pytest.mark.parametrize("chunk", [1, 7, ROWS, ALL_IN_ONE])
@pytest.mark.parametrize("name", MODELS)
def test_loss_imitation_and_every_gradient(name: str, chunk: int) -> None:
    model, batch, theirs = made(name), batch_of(), teacher_logits()
    task, imitation = plain_run(model, batch, theirs)
    (task + 0.7 * imitation).backward()
    expected = gradients(model)
    with lazy(model, chunk, theirs) as head:
        # From the third step on, forward takes the gradients of the steps before for granted.
        for factor in (1.0, 1.0, 1.0, 4.0):
            head.pending_loss = KD.pending_loss(CapturedActivations(logits=theirs), None)
            output = model(**batch)
            own = CapturedActivations(logits=output.logits, pending_loss=head.pending_loss)
            assert name == "bart" or isinstance(output.logits, LazyLogits)
            got = KD(own, CapturedActivations(logits=theirs))
            (factor * (output.loss + 0.7 * got)).backward()
            assert float(output.loss) == pytest.approx(float(task), rel=1e-5)
            assert float(got) == pytest.approx(float(imitation), rel=1e-5)
            assert_same_gradients({n: g / factor for n, g in gradients(model).items()}, expected)
    assert all(gradient.any() for n, gradient in expected.items() if "embed" in n or "wte" in n)


def test_in_float64_too() -> None:
    model, batch, theirs = made("llama").double(), batch_of(), teacher_logits().double()
    output = model(**batch)
    reference = output.loss + KD(
        CapturedActivations(logits=output.logits), CapturedActivations(logits=theirs)
    )
    reference.backward()
    expected = gradients(model)
    with lazy(model, 7, theirs) as head:
        output = model(**batch)
        total = output.loss + KD(
            CapturedActivations(logits=output.logits, pending_loss=head.pending_loss),
            CapturedActivations(logits=theirs),
        )
        total.backward()
    assert float(total) == pytest.approx(float(reference), rel=1e-6)
    assert_same_gradients(gradients(model), expected)


def test_other_factors_and_batches_than_those_of_the_steps_before() -> None:
    model, theirs = made("llama"), teacher_logits()
    few = batch_of()
    few["labels"] = few["labels"].clone()
    few["labels"][:, 3:] = -100
    nothing = {**few, "labels": torch.full_like(few["labels"], -100)}
    with lazy(model, 7, theirs) as head:
        steps = [(0.7, batch_of())] * 3 + [(0.7, few), (0.2, few), (0.2, few), (0.0, few), (0.2, nothing)]
        for weight, batch in steps + [(0.7, batch_of())] * 3:
            head.is_on, head.pending_loss = True, KD.pending_loss(CapturedActivations(logits=theirs), None)
            output = model(**batch)
            kd = KD(
                CapturedActivations(logits=output.logits, pending_loss=head.pending_loss),
                CapturedActivations(logits=theirs),
            )
            (output.loss + weight * kd).backward()
            got = gradients(model)
            head.is_on = False
            task, imitation = plain_run(model, batch, theirs)
            (task + weight * imitation).backward()
            assert_same_gradients(got, gradients(model))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_nothing_to_predict_is_nan_and_the_imitation_is_still_learned(label_smoothing: float) -> None:
    """As with torch, whose mean of nothing is NaN with gradients of zero."""
    model, batch, theirs = made("llama"), batch_of(), teacher_logits()
    nothing = torch.full((ROWS,), -100)

    def run(logits: Any, imitation: Any) -> torch.Tensor:
        loss = F.cross_entropy(logits.view(-1, VOCABULARY), nothing, label_smoothing=label_smoothing)
        (
            loss
            + KD(
                CapturedActivations(logits=logits, pending_loss=imitation), CapturedActivations(logits=theirs)
            )
        ).backward()
        return loss

    assert torch.isnan(run(model(input_ids=batch["input_ids"]).logits, None))
    expected = gradients(model)
    with lazy(model, 7, theirs) as head:
        assert torch.isnan(run(model(input_ids=batch["input_ids"]).logits, head.pending_loss))
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("first", ["task", "imitation"])
def test_whichever_is_asked_for_first(first: str) -> None:
    model, batch, theirs = made("llama"), batch_of(), teacher_logits()
    labels = batch["labels"].view(-1)
    output = model(input_ids=batch["input_ids"])
    (
        F.cross_entropy(output.logits.view(-1, VOCABULARY), labels)
        + KD(CapturedActivations(logits=output.logits), CapturedActivations(logits=theirs))
    ).backward()
    expected = gradients(model)
    with lazy(model, 7, theirs) as head:
        logits, imitation = model(input_ids=batch["input_ids"]).logits, head.pending_loss
        assert imitation is not None
        own = CapturedActivations(logits=logits, pending_loss=imitation)
        if first == "imitation":
            total = KD(own, CapturedActivations(logits=theirs))
            total = total + F.cross_entropy(logits.view(-1, VOCABULARY), labels)
        else:
            total = F.cross_entropy(logits.view(-1, VOCABULARY), labels)
            assert not imitation.is_pending
            total = total + KD(own, CapturedActivations(logits=theirs))
        total.backward()
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize(
    "own_view",
    [
        lambda logits: logits / 0.7,
        lambda logits: 3.0 * logits,
        lambda logits: torch.tanh(logits),
        lambda logits: logits.float() * torch.tensor(2.0),
    ],
    ids=["divided", "multiplied", "tanh", "by a tensor"],
)
def test_a_script_that_scales_logits_for_its_loss_leaves_the_imitation_alone(own_view: Any) -> None:
    model, batch, theirs = made("llama"), batch_of(), teacher_logits()
    labels = batch["labels"].view(-1)

    def run(logits: Any, imitation: Any) -> tuple[float, float]:
        task = F.cross_entropy(own_view(logits).view(-1, VOCABULARY), labels)
        kd = KD(
            CapturedActivations(logits=logits, pending_loss=imitation), CapturedActivations(logits=theirs)
        )
        (task + kd).backward()
        return float(task), float(kd)

    values = run(model(input_ids=batch["input_ids"]).logits, None)
    expected = gradients(model)
    with lazy(model, 7, theirs) as head:
        logits = model(input_ids=batch["input_ids"]).logits
        assert run(logits, head.pending_loss) == pytest.approx(values, rel=1e-5)
    assert_same_gradients(gradients(model), expected)


def test_detached_logits_take_no_gradient_and_no_imitation() -> None:
    model, batch, theirs = made("llama"), batch_of(), teacher_logits()
    with lazy(model, 7, theirs) as head:
        detached = model(input_ids=batch["input_ids"]).logits.detach()
        assert isinstance(detached, LazyLogits) and not detached.requires_grad
        loss = F.cross_entropy(detached.view(-1, VOCABULARY), batch["labels"].view(-1))
        assert not loss.requires_grad and not detached.cpu().requires_grad
        assert head.pending_loss is not None and head.pending_loss.is_pending


def test_autocast() -> None:
    model, batch, theirs = made("llama"), batch_of(), teacher_logits()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        task, imitation = plain_run(model, batch, theirs)
    (task + imitation).backward()
    expected = gradients(model)
    with lazy(model, 7, theirs) as head:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(**batch)
            assert output.logits.dtype is torch.bfloat16
            assert output.logits.float().dtype is torch.float32
        # As in an engine, outside of the context.
        own = CapturedActivations(logits=output.logits, pending_loss=head.pending_loss)
        assert output.logits.materialize().dtype is torch.bfloat16
        got = KD(own, CapturedActivations(logits=theirs))
        (output.loss + got).backward()
    assert float(output.loss) == pytest.approx(float(task), rel=1e-3)
    assert float(got) == pytest.approx(float(imitation), rel=1e-3)
    for name, gradient in gradients(model).items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 0.02, f"{name}: {error}"
