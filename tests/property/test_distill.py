"""Divergences against their definitions in float64, for any predictions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_compress.config.schema.distillation import LogitsLoss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.divergence import divergence_of, log_probabilities, with_tail
from ds_compress.distill.losses.logits import LogitsDistillation
from ds_compress.distill.sparse_logits import SparseLogits

# Models forbid a token by the most negative number there is, or something near it.
FORBIDDEN = (-1e4, -3.4e38, -math.inf)
KINDS = ("forward_kl", "reverse_kl", "jsd")

logit = st.floats(-30.0, 30.0, width=32)
betas = st.floats(1e-6, 1 - 1e-6)


@st.composite
def pairs(draw: Any, least: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of student and teacher, fp32 [rows, categories]; at least the first category is possible for both."""
    rows, categories = draw(st.integers(1, 3)), draw(st.integers(least, 8))
    entry = logit | st.sampled_from(FORBIDDEN)
    row = st.tuples(logit, *[entry] * (categories - 1)).map(list)
    both = [draw(st.lists(row, min_size=rows, max_size=rows)) for _ in range(2)]
    return torch.tensor(both[0]), torch.tensor(both[1])


def exact_kl(p: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL in float64; what has no probability adds nothing."""
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def exact(kind: str, beta: float, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    q, p = (x.double().log_softmax(-1).clamp_min(torch.finfo().min / 4) for x in (student, teacher))
    if kind == "forward_kl":
        return exact_kl(p.exp(), p, q)
    if kind == "reverse_kl":
        return exact_kl(q.exp(), q, p)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log().clamp_min(torch.finfo().min)
    return beta * exact_kl(p.exp(), p, m) + (1 - beta) * exact_kl(q.exp(), q, m)


def found(kind: str, beta: float, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return divergence_of(kind, beta)(log_probabilities(student, 1.0), log_probabilities(teacher, 1.0))


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32 sums of terms of log-probabilities up to the size of the largest divergence there."""
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-5)


@given(both=pairs(), beta=betas, kind=st.sampled_from(KINDS))
def test_divergences(both: tuple[torch.Tensor, torch.Tensor], beta: float, kind: str) -> None:
    got = found(kind, beta, *both)
    assert torch.isfinite(got).all() and (got >= -2e-5).all()
    assert_near(got, exact(kind, beta, *both))


@given(both=pairs(), beta=betas, kind=st.sampled_from(KINDS))
def test_gradients_are_finite_and_exact(
    both: tuple[torch.Tensor, torch.Tensor], beta: float, kind: str
) -> None:
    student, teacher = both
    leaf = student.clone().requires_grad_()
    found(kind, beta, leaf, teacher).sum().backward()
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
    possible = student.clamp_min(-60).double().requires_grad_()
    exact(kind, beta, possible, teacher.clamp_min(-60).double()).sum().backward()
    assert possible.grad is not None
    if min(float(student.min()), float(teacher.min())) >= -60:
        torch.testing.assert_close(leaf.grad.double(), possible.grad, rtol=1e-3, atol=1e-4)


@given(both=pairs(), beta=betas, kind=st.sampled_from(KINDS))
def test_identical_predictions_differ_by_nothing(
    both: tuple[torch.Tensor, torch.Tensor], beta: float, kind: str
) -> None:
    student = both[0].clone().requires_grad_()
    got = found(kind, beta, student, both[0])
    assert got.abs().max() < 1e-6
    got.sum().backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-6


@given(both=pairs(), beta=betas)
def test_jensen_shannon_is_bounded_and_mirrored(both: tuple[torch.Tensor, torch.Tensor], beta: float) -> None:
    student, teacher = both
    entropy = -(beta * math.log(beta) + (1 - beta) * math.log1p(-beta))
    assert (found("jsd", beta, student, teacher) <= entropy + 2e-5).all()
    mirrored = found("jsd", 1 - beta, teacher, student)
    torch.testing.assert_close(found("jsd", beta, student, teacher), mirrored, rtol=1e-4, atol=2e-5)


@given(both=pairs())
def test_jensen_shannon_at_its_ends_is_a_kl(both: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Divided by beta it tends to KL(teacher || student) for beta to 0, and so mirrored (Agarwal et al. 2024)."""
    student, teacher = (x.double().clamp(-3.0, 3.0) for x in both)
    forward, reverse = exact("forward_kl", 0.5, student, teacher), exact("reverse_kl", 0.5, student, teacher)
    # In fp64, so near to the ends that what is left is small: of first order in beta, times a ratio of up to e^6.
    small = 1e-7
    own, other = student.log_softmax(-1), teacher.log_softmax(-1)
    at_zero, at_one = (divergence_of("jsd", beta)(own, other) / small for beta in (small, 1 - small))
    torch.testing.assert_close(at_zero, forward, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(at_one, reverse, rtol=1e-3, atol=1e-6)


def loss(settings: dict[str, Any], student: torch.Tensor, teacher: torch.Tensor) -> float:
    return float(
        LogitsDistillation(LogitsLoss(**settings))(
            CapturedActivations(logits=student), CapturedActivations(logits=teacher)
        )
    )


@given(both=pairs(), kind=st.sampled_from(KINDS), k=st.integers(1, 12))
def test_the_k_likeliest_and_a_tail_are_a_lower_bound(
    both: tuple[torch.Tensor, torch.Tensor], kind: str, k: int
) -> None:
    """With a tail that is not too unlikely; the smallest is kept at 1e-6 for the sake of its gradient."""
    student, teacher = (x.clamp(-3.0, 3.0) for x in both)
    whole = loss({"kind": kind}, student, teacher)
    some = loss({"kind": kind, "top_k": k}, student, teacher)
    assert some <= whole + 2e-5
    if k >= student.shape[1]:
        assert some == whole


@given(both=pairs(least=3), kind=st.sampled_from(KINDS), data=st.data())
def test_top_k_is_the_divergence_of_the_merged_categories(
    both: tuple[torch.Tensor, torch.Tensor], kind: str, data: st.DataObject
) -> None:
    student, teacher = (x.clamp(-5.0, 5.0) for x in both)
    k = data.draw(st.integers(1, student.shape[1] - 1))
    indices = teacher.double().log_softmax(-1).topk(k, -1).indices
    merged = []
    for logits in (student, teacher):
        p = logits.double().softmax(-1)
        kept = p.gather(-1, indices)
        merged.append(torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).clamp_min(1e-6).log())
    expected = float(exact(kind, 0.5, *merged).mean())
    assert loss({"kind": kind, "top_k": k}, student, teacher) == pytest.approx(expected, rel=5e-3, abs=5e-5)


@given(both=pairs(), kind=st.sampled_from(KINDS), padding=st.integers(1, 5), pads_student=st.booleans())
def test_a_padded_vocabulary_is_cut(
    both: tuple[torch.Tensor, torch.Tensor], kind: str, padding: int, pads_student: bool
) -> None:
    student, teacher = both
    extra = torch.full((student.shape[0], padding), 2.0)
    padded = (
        (torch.cat([student, extra], -1), teacher)
        if pads_student
        else (student, torch.cat([teacher, extra], -1))
    )
    assert loss({"kind": kind}, *padded) == loss({"kind": kind}, student, teacher)


@given(both=pairs(least=3), kind=st.sampled_from(KINDS), k=st.integers(1, 8), padding=st.integers(0, 4))
def test_stored_predictions_are_those_of_a_live_teacher(
    both: tuple[torch.Tensor, torch.Tensor], kind: str, k: int, padding: int
) -> None:
    """Also for a student whose vocabulary is padded beyond the teacher's."""
    student, teacher = both
    k = min(k, teacher.shape[1] - 1)
    likely = log_probabilities(teacher, 1.0).topk(k, -1)
    stored: Any = SparseLogits(likely.indices, likely.values, teacher.shape)
    padded = torch.cat([student, torch.full((student.shape[0], padding), 2.0)], -1)
    live = loss({"kind": kind, "top_k": k}, padded, teacher)
    assert loss({"kind": kind}, padded, stored) == pytest.approx(live, rel=1e-6, abs=1e-7)


@given(rows=st.integers(1, 4), categories=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_a_tail_completes_a_distribution(rows: int, categories: int, seed: int) -> None:
    logits = torch.randn(rows, categories + 1, generator=torch.Generator().manual_seed(seed))
    log_probs = logits.log_softmax(-1)[:, :categories].requires_grad_()
    completed = with_tail(log_probs)
    torch.testing.assert_close(completed.exp().sum(-1), torch.ones(rows), rtol=0, atol=1e-5)
    completed[:, -1].sum().backward()
    assert log_probs.grad is not None and torch.isfinite(log_probs.grad).all()


def test_a_tail_of_nothing_is_finite() -> None:
    certain = torch.zeros(1, 1, requires_grad=True)
    with_tail(certain).sum().backward()
    assert torch.isfinite(with_tail(certain)).all()
    assert certain.grad is not None and torch.isfinite(certain.grad).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_that_both_models_forbid_add_nothing(kind: str, temperature: float) -> None:
    """Divided by a temperature below 1, the most negative number is -inf."""
    settings = {"kind": kind, "temperature": temperature}
    student, teacher = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).split(1)
    expected = loss(settings, student, teacher)
    for forbidden in (torch.finfo().min, -math.inf):
        column = torch.full((1, 1), forbidden)
        with_both = [torch.cat([x, column], -1) for x in (student, teacher)]
        assert loss(settings, *with_both) == pytest.approx(expected, rel=1e-6)
