"""Lazy logits in place of a tensor: cross entropies in chunks, everything else on the materialized logits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.lazy_head import LazyHead
from ds_compress.distill.lazy_logits import LazyLogits
from tests.unit.distill.lazy import (
    BATCH,
    KD,
    ROWS,
    TOKENS,
    VOCABULARY,
    assert_same_gradients,
    batch_of,
    gradients,
    lazy,
    made,
    plain_and_lazy,
    teacher_logits,
)


def test_no_rows_at_all() -> None:
    model = made("llama")
    with lazy(model, 7):
        logits = model.lm_head(torch.zeros(0, TOKENS, 16, requires_grad=True))
        assert logits.shape == (0, TOKENS, VOCABULARY)
        flat = logits.view(-1, VOCABULARY)
        total = F.cross_entropy(flat, torch.zeros(0, dtype=torch.long), reduction="sum")
        assert float(total) == 0.0
        assert torch.isnan(F.cross_entropy(flat, torch.zeros(0, dtype=torch.long)))
        total.backward()
        assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_cross_entropies_of_a_script(reduction: str, label_smoothing: float, ignore_index: int) -> None:
    """Shifted by hand, as scripts do; the imitation is of all rows all the same."""
    model, batch, theirs = made("llama"), batch_of(), teacher_logits()
    labels = batch["labels"].masked_fill(batch["labels"] == -100, ignore_index)

    def loss_of(head: LazyHead | None = None) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"]).logits
        imitation = None if head is None else head.pending_loss
        task = F.cross_entropy(
            logits[..., :-1, :].contiguous().view(-1, VOCABULARY),
            labels[:, 1:].reshape(-1),
            reduction=reduction,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
        return task + KD(
            CapturedActivations(logits=logits, pending_loss=imitation), CapturedActivations(logits=theirs)
        )

    expected_loss = loss_of()
    expected_loss.backward()
    expected = gradients(model)
    with lazy(model, 5, theirs) as head:
        got = loss_of(head)
        got.backward()
    assert float(got) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_number_of_items_of_an_accumulated_batch(name: str) -> None:
    model, batch = made(name), batch_of()
    items = torch.tensor(41)
    expected = model(**batch, num_items_in_batch=items).loss
    expected.backward()
    wanted = gradients(model)
    with lazy(model, 7):
        got = model(**batch, num_items_in_batch=items).loss
        got.backward()
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    assert_same_gradients(gradients(model), wanted)


def test_a_learned_factor_gets_its_gradient() -> None:
    model, batch = made("llama"), batch_of()
    factor = nn.Parameter(torch.tensor(1.7))
    labels = batch["labels"].view(-1)

    def run() -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"]).logits * factor
        F.cross_entropy(logits.view(-1, VOCABULARY), labels).backward()
        gradient, factor.grad = factor.grad, None
        assert gradient is not None
        return gradient

    expected = run()
    with lazy(model, 7):
        torch.testing.assert_close(run(), expected)


ROWS_OF_A_COLUMN = torch.randn(BATCH, TOKENS, 1, generator=torch.Generator().manual_seed(3))


USES: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda x: x.argmax(-1),
    "torch.argmax": lambda x: torch.argmax(x, dim=-1),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "one token": lambda x: x[:, -1, :],
    "one row": lambda x: x[0],
    "some categories": lambda x: x[..., :5],
    "categories behind an ellipsis": lambda x: x.view(-1, VOCABULARY)[:, ..., :5],
    "categories behind slices and an ellipsis": lambda x: x[:, :, ..., :5],
    "an ellipsis last": lambda x: x[1:, ...],
    "a mask": lambda x: x[torch.arange(ROWS).view(BATCH, TOKENS) % 2 == 0],
    "a new axis": lambda x: x[None],
    "flat": lambda x: x.view(-1),
    "permuted": lambda x: x.permute(0, 2, 1),
    "gathered": lambda x: x.gather(-1, torch.zeros(BATCH, TOKENS, 1, dtype=torch.long)),
    "plus a number": lambda x: x + 1.0,
    "a number minus it": lambda x: 1.0 - x,
    "minus a tensor": lambda x: x - ROWS_OF_A_COLUMN,
    "a tensor plus it": lambda x: ROWS_OF_A_COLUMN + x,
    "times a tensor": lambda x: x * ROWS_OF_A_COLUMN,
    "a number over it": lambda x: 1.0 / (x + 3.0),
    "negated": lambda x: -x,
    "squared": lambda x: x**2,
    "abs": lambda x: abs(x),
    "times a matrix": lambda x: x @ torch.ones(VOCABULARY, 2),
    "greater": lambda x: x > 0,
    "equal": lambda x: x == x.max(),
    "stacked": lambda x: torch.stack([x, x]),
    "joined": lambda x: torch.cat([x, x.float()], dim=0),
    "in a tuple": lambda x: torch.cat(tensors=(x, x)),
    "scaled, cast and sliced": lambda x: (x * 2).to(torch.float64)[:, 1:].argmax(-1),
    "rows one by one": lambda x: [row.sum() for row in x][1],
    "no axis named": lambda x: x.size(),
    "an axis named": lambda x: torch.tensor([x.size(-1), len(x), x.dim()]),
    "numel": lambda x: torch.tensor(x.numel()),
    "a list": lambda x: torch.tensor(x.tolist()),
    "numpy": lambda x: torch.tensor(x.detach().numpy()),
}


@pytest.mark.parametrize("use", USES)
def test_anything_else_gets_the_real_logits(use: str) -> None:
    real, late, stack = plain_and_lazy()
    with stack:
        expected, got = USES[use](real), USES[use](late)
        if isinstance(got, LazyLogits):
            got = got.materialize()
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        else:
            assert got == expected


class RowsOfLogits(TorchDispatchMode):
    """Counts the rows of logits that the head computes: results of its matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.rows += result.shape[0] if result.shape[-1] == VOCABULARY else 0
        return result


def test_a_loop_over_logits_computes_the_head_once() -> None:
    model, batch = made("llama"), batch_of(6)
    expected = model(input_ids=batch["input_ids"]).logits
    with lazy(model, 7):
        logits = model(input_ids=batch["input_ids"]).logits
        with RowsOfLogits() as counted:
            rows = list(logits)
            again = logits.argmax(-1)
        assert counted.rows == 6 * TOKENS + 1, (
            "all rows once, and the one row that the module's own forward sees"
        )
        torch.testing.assert_close(torch.stack(rows), expected)
        assert torch.equal(again, expected.argmax(-1))
        sum(row.sum() for row in rows).backward()
    expected_gradients = gradients(model)
    expected.sum().backward()
    assert_same_gradients(expected_gradients, gradients(model))


def test_logits_that_were_kept_without_a_graph_are_computed_again_for_a_gradient() -> None:
    real, late, stack = plain_and_lazy()
    with stack:
        with torch.no_grad():
            assert not late[0].requires_grad
        assert late[0].requires_grad
        late[..., [3]] = -50.0
        assert bool((late[0][:, 3] == -50.0).all()), "an assignment drops what was kept"
        torch.testing.assert_close(late[0][:, 4:], real[0][:, 4:])


def test_forbidden_tokens_are_set_as_models_do_it() -> None:
    real, late, stack = plain_and_lazy()
    changed = real.clone()
    changed[:, :, [3, 5]] = -50.0
    labels = torch.randint(6, VOCABULARY, (ROWS,))
    with stack:
        late[:, :, [3, 5]] = -50.0
        got = F.cross_entropy(late.view(-1, VOCABULARY), labels)
        assert float(got) == pytest.approx(
            float(F.cross_entropy(changed.view(-1, VOCABULARY), labels)), rel=1e-5
        )
        torch.testing.assert_close(late.materialize(), changed)
        with pytest.raises(TypeError, match="chunk_tokens to 0"):
            late[0] = 1.0
        with pytest.raises(TypeError, match="chunk_tokens to 0"):
            late[..., 3] = torch.zeros(BATCH, TOKENS)


def test_a_class_weight_needs_whole_logits_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = made("llama"), batch_of()
    weight = torch.linspace(0.5, 2.0, VOCABULARY)
    labels = batch["labels"].view(-1)

    def loss_of() -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"]).logits
        return nn.CrossEntropyLoss(weight=weight)(logits.view(-1, VOCABULARY), labels)

    expected = loss_of()
    expected.backward()
    wanted = gradients(model)
    logger = logging.getLogger("ds_compress")
    with lazy(model, 7), caplog.at_level(logging.WARNING, logger="ds_compress"):
        logger.addHandler(caplog.handler)
        try:
            got = loss_of()
            got.backward()
            loss_of()
        finally:
            logger.removeHandler(caplog.handler)
    warnings = {id(record) for record in caplog.records if "computed whole" in record.getMessage()}
    assert len(warnings) == 1
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    assert_same_gradients(gradients(model), wanted)


@pytest.mark.parametrize("target", ["probabilities", "no reduction"])
def test_other_cross_entropies_get_whole_logits(target: str) -> None:
    real, late, stack = plain_and_lazy()

    def loss_of(logits: Any) -> torch.Tensor:
        flat = logits.view(-1, VOCABULARY)
        if target == "probabilities":
            return F.cross_entropy(flat, torch.full((ROWS, VOCABULARY), 1 / VOCABULARY))
        return F.cross_entropy(flat, torch.arange(ROWS), reduction="none")

    with stack:
        torch.testing.assert_close(loss_of(late), loss_of(real))
