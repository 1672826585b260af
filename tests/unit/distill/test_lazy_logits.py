"""Logits in chunks against a plain model: values, every gradient, and that whole logits never exist."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ds_compress
from ds_compress.config.schema.distillation import LogitsLoss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.lazy_head import LazyHead
from ds_compress.distill.lazy_logits import LazyLogits
from ds_compress.distill.lm_head import lazy_head
from ds_compress.distill.losses.logits import LogitsDistillation
from tests.models import tiny_bert, tiny_gpt2, tiny_llama
from tests.multirank.common import ds_config
from tests.quantized import quantized

VOCABULARY = 61
BATCH, TOKENS = 3, 9
ROWS = BATCH * TOKENS
ALL_IN_ONE = 1000
TINY = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
NO_PADDING = {"intermediate_size": 24, "pad_token_id": None}
SMALL = {**TINY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def llama(tied: bool = False, **changed: Any) -> nn.Module:
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "key_value_heads": 1, "intermediate": 24}
    return tiny_llama(None, **sizes, tied=tied, vocab_size=VOCABULARY, pad_token_id=None, **changed)


def gpt2() -> nn.Module:
    return tiny_gpt2(None, layers=1, vocab_size=VOCABULARY, n_positions=32)


def bert() -> nn.Module:
    model = tiny_bert(None, head="ForMaskedLM", layers=1, hidden=16, heads=2, **TINY, **NO_PADDING)
    nn.init.normal_(model.cls.predictions.decoder.bias)
    return model


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    # A cap that bends these small logits.
    return Gemma2ForCausalLM(
        Gemma2Config(
            **SMALL, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.05, pad_token_id=None
        )
    )


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
    }
    model = BartForConditionalGeneration(BartConfig(**TINY, d_model=16, dropout=0.0, **sides))
    model.final_logits_bias.normal_()
    return model


def quantized_head() -> nn.Module:
    return quantized(llama(), bits=4, modules=("lm_head",))


def learned_head() -> nn.Module:
    return quantized(
        llama(),
        bits=4,
        modules=("lm_head",),
        learned_scale=True,
        quantization_type="symmetric",
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "bert": bert,
    "gemma2": gemma2,
    "bart": bart,
    "quantized head": quantized_head,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def batch_of(rows: int = BATCH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, TOKENS), generator=generator)
    labels = ids.clone()
    labels[:, ::4] = -100
    return {"input_ids": ids, "labels": labels}


def teacher_logits(rows: int = BATCH) -> torch.Tensor:
    return torch.randn(rows, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(2))


KD = LogitsDistillation(LogitsLoss(temperature=2.0))


@contextlib.contextmanager
def lazy(model: nn.Module, chunk: int, theirs: torch.Tensor | None = None) -> Iterator[LazyHead]:
    """The head of `model` is lazy inside, its imitation of `theirs` waiting as in a training forward."""
    head = lazy_head(model, chunk)
    assert head is not None
    head.is_on = True
    head.pending_loss = None if theirs is None else KD.pending_loss(CapturedActivations(logits=theirs), None)
    try:
        yield head
    finally:
        head.remove()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def plain_run(
    model: nn.Module, batch: dict[str, torch.Tensor], theirs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(**batch)
    return output.loss, KD(CapturedActivations(logits=output.logits), CapturedActivations(logits=theirs))


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


def test_a_learned_scale_of_the_head_gets_its_gradient() -> None:
    torch.manual_seed(0)
    model, batch = learned_head(), batch_of()
    model(**batch).loss.backward()
    expected = gradients(model)
    with lazy(model, 7):
        model(**batch).loss.backward()
    assert "lm_head.weight_step_size" in expected and expected["lm_head.weight_step_size"].any()
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize(("granularity", "is_lazy"), [("per_token", True), ("per_tensor", False)])
def test_a_head_that_measures_its_whole_batch_is_left_alone(granularity: str, is_lazy: bool) -> None:
    """A chunk has another range than the batch."""
    inputs = {"range_calibration": "dynamic", "granularity": granularity}
    model = quantized(llama(), inputs=inputs, modules=("lm_head",))
    head = lazy_head(model, 7)
    assert (head is not None) == is_lazy
    if head is None:
        return
    expected = model(**batch_of()).loss
    head.is_on = True
    assert float(model(**batch_of()).loss) == pytest.approx(float(expected), rel=1e-5)


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


@pytest.mark.parametrize("steps_before", [0, 3])
def test_two_backwards_of_one_forward_add_up(steps_before: int) -> None:
    model, batch = made("llama"), batch_of()
    model(**batch).loss.backward()
    expected = gradients(model)
    with lazy(model, 7):
        for _ in range(steps_before):
            model(**batch).loss.backward()
        model.zero_grad()
        loss = model(**batch).loss
        (2.0 * loss).backward(retain_graph=True)
        (3.0 * loss).backward()
    assert_same_gradients({n: g / 5.0 for n, g in gradients(model).items()}, expected)


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


def plain_and_lazy(name: str = "llama") -> tuple[torch.Tensor, Any, Any]:
    """Real logits, the lazy ones of the same inputs, and what takes the hooks away."""
    model, batch = made(name), batch_of()
    real = model(input_ids=batch["input_ids"]).logits
    stack = contextlib.ExitStack()
    stack.enter_context(lazy(model, 7))
    return real, model(input_ids=batch["input_ids"]).logits, stack


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


def test_detached_logits_take_no_gradient_and_no_imitation() -> None:
    model, batch, theirs = made("llama"), batch_of(), teacher_logits()
    with lazy(model, 7, theirs) as head:
        detached = model(input_ids=batch["input_ids"]).logits.detach()
        assert isinstance(detached, LazyLogits) and not detached.requires_grad
        loss = F.cross_entropy(detached.view(-1, VOCABULARY), batch["labels"].view(-1))
        assert not loss.requires_grad and not detached.cpu().requires_grad
        assert head.pending_loss is not None and head.pending_loss.is_pending


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


def test_a_frozen_head_takes_no_gradient_and_passes_one_on() -> None:
    model, batch = made("llama"), batch_of()
    model.lm_head.requires_grad_(False)
    model(**batch).loss.backward()
    expected = gradients(model)
    with lazy(model, 7):
        model(**batch).loss.backward()
    assert "lm_head.weight" not in expected
    assert_same_gradients(gradients(model), expected)


def test_hooks_of_others_see_the_head_and_removal_leaves_nothing() -> None:
    model, batch = made("llama"), batch_of()
    seen: list[Any] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    with lazy(model, 7):
        model(**batch)
    handle.remove()
    assert len(seen) == 2 and not any(VOCABULARY in getattr(output, "shape", ()) for output in seen)
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks
    assert isinstance(model(**batch).logits, torch.Tensor)


class LargestLogits(TorchDispatchMode):
    """The most rows of logits that any tensor had while this was on, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            shape = value.shape if isinstance(value, torch.Tensor) else ()
            # The weight of the head has VOCABULARY rows of 16.
            if VOCABULARY in shape and 16 not in shape:
                self.rows = max(self.rows, value.numel() // VOCABULARY)
        return result


def taught(**logits: Any) -> Any:
    torch.manual_seed(0)
    student, teacher = llama(), llama()
    block = {"distillation": {"enabled": True, "losses": {"logits": logits}, "teacher_zero_stage": 0}}
    engine, *_ = ds_compress.initialize(
        model=student, model_parameters=student.parameters(), config=ds_config(0, block), teacher=teacher
    )
    return engine


def rows_alive(chunk: int | None, script: Callable[[Any, dict[str, torch.Tensor]], Any], **kind: Any) -> int:
    engine = taught(**({} if chunk is None else {"chunk_tokens": chunk}), **kind)
    with LargestLogits() as largest:
        for _ in range(3):
            engine.backward(script(engine, batch_of()))
            engine.step()
    engine.destroy()
    return largest.rows


def models_loss(engine: Any, batch: dict[str, torch.Tensor]) -> Any:
    return engine(**batch).loss


def scripts_loss(engine: Any, batch: dict[str, torch.Tensor]) -> Any:
    logits = engine(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY), batch["labels"][:, 1:].reshape(-1), label_smoothing=0.1
    )


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("script", [models_loss, scripts_loss])
@pytest.mark.parametrize("kind", [{}, {"kind": "jsd"}, {"kind": "reverse_kl", "top_k": 4}], ids=str)
def test_whole_logits_never_exist(script: Any, kind: dict[str, Any]) -> None:
    assert rows_alive(5, script, **kind) == 5


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("script", [models_loss, scripts_loss])
def test_whole_logits_exist_without_chunks(script: Any) -> None:
    assert rows_alive(0, script) >= ROWS - BATCH


@pytest.mark.usefixtures("single_process")
def test_a_small_batch_is_one_chunk_by_default() -> None:
    assert rows_alive(None, models_loss) == ROWS


@pytest.mark.usefixtures("single_process")
def test_a_forward_that_raises_leaves_nothing_lazy() -> None:
    engine, batch = taught(chunk_tokens=5), batch_of()
    expected = engine.module(**batch).loss.item()
    handle = engine.module.lm_head.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine(**batch)
    handle.remove()
    with torch.no_grad():
        assert type(engine(**batch).logits) is torch.Tensor
    loss = engine(**batch).loss
    assert loss.item() == pytest.approx(expected)
    engine.backward(loss)
    engine.step()
    engine.destroy()
