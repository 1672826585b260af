"""The head that makes logits lazy: its gradients, its hooks, and that whole logits never exist in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ds_compress
from ds_compress.distill.lm_head import lazy_head
from tests.multirank.common import ds_config
from tests.quantized import quantized
from tests.unit.distill.lazy import (
    BATCH,
    ROWS,
    VOCABULARY,
    assert_same_gradients,
    batch_of,
    gradients,
    lazy,
    learned_head,
    llama,
    made,
)


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
