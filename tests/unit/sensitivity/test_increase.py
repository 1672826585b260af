"""The numbers against their definitions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_compress.sensitivity.increase import Metric, divergence, increase, metric_for, reference

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
IDS = torch.tensor([[1, 2, 3, 0], [3, 2, 1, 0]])
TOKENS = {"input_ids": IDS, "attention_mask": MASK}


def outputs(*shape: int, seed: int = 0, name: str = "logits") -> Any:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    return SimpleNamespace(**{name: values})


def model(generates: bool = True, **config: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(**config), can_generate=lambda: generates)


def kl(original: torch.Tensor, changed: torch.Tensor) -> float:
    return float(kl_of_rows(original, changed).sum())


def kl_of_rows(original: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    p, q = (x.double().log_softmax(-1) for x in (original, changed))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("logits", [1, 10, 25, 1024])
def test_divergence_of_tokens_leaves_padding_out(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_compress.sensitivity.increase._CHUNK", logits)
    one, two = outputs(2, 4, 5), outputs(2, 4, 5, seed=1)
    of = reference(one, TOKENS, Metric.KL)
    assert of.weight == 7
    real = MASK.bool()
    assert increase(two, TOKENS, of) == pytest.approx(kl(one.logits[real], two.logits[real]), rel=1e-5)
    two.logits[0, 3] += 100 * torch.randn(5)
    assert increase(two, TOKENS, of) == pytest.approx(kl(one.logits[real], two.logits[real]), rel=1e-5)
    assert increase(one, TOKENS, of) == 0


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0, 200.0])
def test_divergence_is_accurate_whatever_its_size(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(6, 300, generator=generator) * 5
    one[0] += 1000  # a constant says nothing
    one[1, 2:] = -1e30  # nearly impossible classes
    two = one + size * torch.randn(6, 300, generator=generator)
    exact = kl_of_rows(one, two)
    found = divergence(two, one, one.softmax(-1)).double()
    assert bool((found >= 0).all())
    torch.testing.assert_close(found[1:], exact[1:], rtol=2e-3, atol=1e-12)
    torch.testing.assert_close(found[0], exact[0], rtol=0.05, atol=1e-8)  # fp32 logits around 1000


def test_divergence_of_examples() -> None:
    one, two = outputs(2, 3), outputs(2, 3, seed=1)
    of = reference(one, TOKENS, Metric.KL)
    assert of.weight == 2
    assert increase(two, TOKENS, of) == pytest.approx(kl(one.logits, two.logits), rel=1e-5)


def test_loss_of_a_language_model_predicts_each_token_from_those_before() -> None:
    one, two = outputs(2, 4, 5), outputs(2, 4, 5, seed=1)
    of = reference(one, TOKENS, Metric.LOSS)

    def loss(logits: torch.Tensor) -> float:
        log_probs = logits.double().log_softmax(-1)
        pairs = [(0, 0, 2), (0, 1, 3), (1, 0, 2), (1, 1, 1), (1, 2, 0)]
        return float(-sum(log_probs[pair] for pair in pairs))

    assert of.weight == 5
    assert increase(two, TOKENS, of) == pytest.approx(loss(two.logits) - loss(one.logits), rel=1e-5)


def test_loss_of_a_classifier() -> None:
    one, two = outputs(2, 3), outputs(2, 3, seed=1)
    batch = {**TOKENS, "labels": torch.tensor([2, 0])}
    of = reference(one, batch, Metric.LOSS)
    expected = [float(-x.logits.double().log_softmax(-1)[[0, 1], [2, 0]].sum()) for x in (one, two)]
    assert of.weight == 2
    assert increase(two, batch, of) == pytest.approx(expected[1] - expected[0], rel=1e-5)
    with pytest.raises(ValueError, match="class 3 in the data, and the model has 3"):
        reference(one, {**batch, "labels": torch.tensor([3, 0])}, Metric.LOSS)
    with pytest.raises(ValueError, match="needs classes"):
        reference(one, TOKENS, Metric.LOSS)
    with pytest.raises(ValueError, match="give no column of classes"):
        reference(outputs(2, 4, 5), batch, Metric.LOSS)


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 6)])
def test_relative_error(shape: tuple[int, ...]) -> None:
    one = outputs(*shape, name="last_hidden_state")
    two = outputs(*shape, seed=1, name="last_hidden_state")
    of = reference(one, TOKENS, Metric.RELATIVE_ERROR)
    real = MASK.bool() if len(shape) == 3 else slice(None)
    a, b = (x.last_hidden_state.double()[real] for x in (one, two))
    assert of.weight == pytest.approx(float((a * a).sum()))
    assert increase(two, TOKENS, of) == pytest.approx(float(((a - b) ** 2).sum()))


def test_which_metric_a_model_has() -> None:
    assert metric_for(outputs(2, 4, 5), model(), False) is Metric.KL
    assert metric_for(outputs(2, 4, 5), model(), True) is Metric.LOSS
    assert metric_for(outputs(2, 3), model(generates=False), True) is Metric.LOSS
    for regression in (outputs(2, 1), outputs(2, 4, 5, name="last_hidden_state")):
        assert metric_for(regression, model(), False) is Metric.RELATIVE_ERROR
        with pytest.raises(ValueError, match="no cross-entropy"):
            metric_for(regression, model(), True)
    assert metric_for(outputs(2, 3), model(problem_type="regression"), False) is Metric.RELATIVE_ERROR
    with pytest.raises(ValueError, match="labels of the tokens"):
        metric_for(outputs(2, 4, 5), model(generates=False), True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("metric", [Metric.KL, Metric.LOSS, Metric.RELATIVE_ERROR])
def test_what_is_not_finite_shows(value: float, metric: Metric) -> None:
    one, two = outputs(2, 4, 5), outputs(2, 4, 5, seed=1)
    of = reference(one, TOKENS, metric)
    two.logits[0, 1, 2] = value
    found = increase(two, TOKENS, of)
    assert found != found or found == float("inf")
    with pytest.raises(ValueError, match="not finite"):
        reference(two, TOKENS, metric)


def test_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="neither logits nor"):
        reference(SimpleNamespace(), TOKENS, Metric.KL)
