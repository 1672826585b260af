"""By how much outputs of a changed model differ from those of the model as it was, summed over a batch.

Without labels: the Kullback-Leibler divergence KL(original || changed) of the predictions, in nats, for each token or
each example; it is how much the expected cross-entropy grows if the original's predictions are the truth. Models that
predict no classes: the squared error of the output relative to its square. With labels: the growth of the
cross-entropy itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F

_CHUNK = 2**20
"""Logits that are compared at a time: what a processor's cache holds."""
_LARGEST_EXPONENT = 80.0
"""Of fp32, with a margin."""


class Metric(StrEnum):
    """What is summed."""

    KL = "kl"
    LOSS = "loss"
    RELATIVE_ERROR = "relative_error"

    @property
    def is_relative(self) -> bool:
        """Whether it is divided by the square of the output, not by a number of predictions."""
        return self is Metric.RELATIVE_ERROR

    @property
    def unit(self) -> str:
        """In words."""
        if self.is_relative:
            return "squared error / square of the output"
        return "nats per prediction"


@dataclass(frozen=True)
class Reference:
    """Outputs [predictions, classes or features] of the model as it is, for one batch.

    weight: predictions, or of a relative error the square of the output. probabilities: fp32, where divergences are
    measured. truth: int64 [predictions], classes. base: fp64, its own cross-entropy, summed.
    """

    metric: Metric
    values: torch.Tensor
    weight: float
    probabilities: torch.Tensor | None = None
    truth: torch.Tensor | None = None
    base: float = 0.0


def metric_for(outputs: Any, model: Any, wants_loss: bool) -> Metric:
    """Raises ValueError where the loss is wanted of a model for which it cannot be computed here."""
    logits, name = _logits(outputs), type(model).__name__
    is_regression = getattr(model.config, "problem_type", None) == "regression"
    predicts = logits is not None and logits.shape[-1] > 1 and not is_regression
    if wants_loss:
        if logits is None or not predicts:
            raise ValueError(
                f"a {name} predicts no classes, so it has no cross-entropy: leave the metric out"
            )
        if logits.dim() == 3 and not model.can_generate():
            raise ValueError(f"labels of the tokens of a {name} are not known here: leave the metric out")
        return Metric.LOSS
    return Metric.KL if predicts else Metric.RELATIVE_ERROR


def reference(outputs: Any, batch: Mapping[str, torch.Tensor], metric: Metric) -> Reference:
    """Of the outputs of the model as it is.

    Raises:
        ValueError: they are not finite, or there are no labels for the loss.
    """
    values, truth = _predictions(outputs, batch, metric)
    if truth is not None and len(truth) and int(truth.max()) >= values.shape[-1]:
        raise ValueError(
            f"class {int(truth.max())} in the data, and the model has {values.shape[-1]} (from 0)"
        )
    if not bool(torch.isfinite(values).all()):
        raise ValueError("the model's own outputs are not finite on the calibration set")
    if metric is Metric.RELATIVE_ERROR:
        return Reference(metric, values, float(values.double().square().sum()))
    weight = float(len(values))
    if truth is not None:
        return Reference(metric, values, weight, truth=truth, base=_cross_entropy(values, truth))
    return Reference(metric, values, weight, F.softmax(values.float(), dim=-1))


def increase(outputs: Any, batch: Mapping[str, torch.Tensor], of: Reference) -> float:
    """Summed over the predictions of a batch; NaN or Inf where the outputs are not finite."""
    values, truth = _predictions(outputs, batch, of.metric)
    if of.metric is Metric.RELATIVE_ERROR:
        return float((values.double() - of.values.double()).square().sum())
    if of.metric is Metric.LOSS:
        assert truth is not None
        return _cross_entropy(values, truth) - of.base
    assert of.probabilities is not None
    parts = zip(*(_chunks(rows) for rows in (values, of.values, of.probabilities)), strict=True)
    return sum(float(divergence(*rows).sum(dtype=torch.float64)) for rows in parts)


def divergence(changed: torch.Tensor, original: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """fp32 or fp64 [rows]: KL(original || changed) of logits [rows, classes]; probabilities: softmax of `original`.

    With e the difference of the logits less its mean under p, the divergence is log(sum of p * exp(e)), and the sum of
    p * e is 0, so it is log1p(sum of p * (exp(e) - 1 - e)). No term is negative and nothing cancels, so that small
    divergences, such as those of 8 bits, are more than the rounding of fp32.
    """
    difference = changed.float() - original.float()
    difference -= (probabilities * difference).sum(-1, keepdim=True)
    if not bool((difference < _LARGEST_EXPONENT).all()):  # or NaN
        mine, known = (F.log_softmax(rows.double(), dim=-1) for rows in (changed, original))
        return F.kl_div(mine, known, reduction="none", log_target=True).sum(-1)
    return torch.log1p((probabilities * (torch.expm1(difference) - difference)).sum(-1))


def _cross_entropy(values: torch.Tensor, truth: torch.Tensor) -> float:
    total = 0.0
    parts = _chunks(values)
    for rows, classes in zip(parts, truth.split(len(parts[0])), strict=True):
        total += float(F.cross_entropy(rows.float(), classes, reduction="none").sum(dtype=torch.float64))
    return total


def _chunks(values: torch.Tensor) -> Sequence[torch.Tensor]:
    return values.split(max(1, _CHUNK // values.shape[-1]))


def _logits(outputs: Any) -> torch.Tensor | None:
    found = getattr(outputs, "logits", None)
    return found if isinstance(found, torch.Tensor) else None


def _predictions(
    outputs: Any, batch: Mapping[str, torch.Tensor], metric: Metric
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """([predictions, classes], their classes where the loss is wanted): padding left out."""
    found = _logits(outputs)
    if found is None:
        found = getattr(outputs, "last_hidden_state", None)
    if not isinstance(found, torch.Tensor):
        raise ValueError("the model returns neither logits nor last_hidden_state: nothing to compare")
    mask = batch["attention_mask"].bool()
    if metric is not Metric.LOSS:
        is_per_token = found.dim() == 3 and found.shape[:2] == mask.shape
        return (found[mask] if is_per_token else found.reshape(-1, found.shape[-1])), None
    labels = batch.get("labels")
    if found.dim() == 2:
        if labels is None:
            raise ValueError(
                "the loss of a classifier needs classes: say in which column of a .jsonl they are"
            )
        return found, labels.to(found.device)
    if labels is not None:
        raise ValueError("a model that predicts tokens has its text for labels: give no column of classes")
    # A token is predicted from those before it.
    follows = mask[:, 1:] & mask[:, :-1]
    return found[:, :-1][follows], batch["input_ids"][:, 1:][follows]
