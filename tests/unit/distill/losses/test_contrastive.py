"""InfoNCE and CRD against their formulas written out, with a queue, padding and states."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from ds_compress.config.schema.distillation import ContrastiveLoss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.losses.base import ModelPair
from ds_compress.distill.losses.contrastive import ContrastiveDistillation

WIDTHS = (6, 10)


def contrastive(**settings: Any) -> ContrastiveDistillation:
    torch.manual_seed(0)
    return ContrastiveDistillation(
        ContrastiveLoss(**{"dimension": 5, "temperature": 0.2, **settings}), ModelPair(WIDTHS)
    )


def pooled(examples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, WIDTHS[0], generator=generator), torch.randn(
        examples, WIDTHS[1], generator=generator
    )


def cosine(loss: ContrastiveDistillation, own: torch.Tensor, theirs: torch.Tensor) -> float:
    sides = []
    for side, vector in (("student", own), ("teacher", theirs)):
        matrix: Any = loss.module[side]
        sides.append(matrix.weight.double() @ vector.double() + matrix.bias.double())
    a, b = sides
    return float((a @ b) / a.norm() / b.norm())


def exact_infonce(loss: ContrastiveDistillation, own: Any, candidates: Any, temperature: float) -> float:
    total = 0.0
    for i, student in enumerate(own):
        exponentials = [math.exp(cosine(loss, student, teacher) / temperature) for teacher in candidates]
        total -= math.log(exponentials[i] / sum(exponentials))
    return total / len(own)


def exact_crd(
    loss: ContrastiveDistillation, own: Any, candidates: Any, temperature: float, examples: int
) -> float:
    total, negatives = 0.0, len(candidates) - 1
    for i, student in enumerate(own):
        for j, teacher in enumerate(candidates):
            e = math.exp(cosine(loss, student, teacher) / temperature)
            h = e / (e + negatives / examples)
            total -= math.log(h if i == j else 1 - h)
    return total / len(own)


@pytest.mark.parametrize("kind", ["infonce", "crd"])
def test_contrastive_losses_of_batches_of_two_sizes_and_a_queue(kind: str) -> None:
    extra = {"examples": 50} if kind == "crd" else {}
    loss = contrastive(kind=kind, queue=6, **extra)
    remembered = torch.empty(0, WIDTHS[1])
    for step, examples in enumerate((3, 5, 2, 4)):
        own, theirs = pooled(examples, step)
        candidates = torch.cat([theirs, remembered])
        expected = (
            exact_infonce(loss, own, candidates, 0.2)
            if kind == "infonce"
            else exact_crd(loss, own, candidates, 0.2, 50)
        )
        assert float(loss(CapturedActivations(last=own), CapturedActivations(last=theirs))) == pytest.approx(
            expected, rel=1e-4
        )
        # Newest first, and no more than six.
        remembered = candidates[:6]
        torch.testing.assert_close(loss.state_dict()["queue"], remembered)


def test_the_queue_comes_back_from_its_state() -> None:
    one, other = contrastive(queue=6), contrastive(queue=6)
    for step in range(3):
        own, theirs = pooled(4, step)
        one(CapturedActivations(last=own), CapturedActivations(last=theirs))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    own, theirs = pooled(4, 9)
    a, b = (loss(CapturedActivations(last=own), CapturedActivations(last=theirs)) for loss in (one, other))
    fresh = contrastive(queue=6)(CapturedActivations(last=own), CapturedActivations(last=theirs))
    assert torch.equal(a, b) and not torch.equal(a, fresh)


def test_nothing_is_remembered_without_a_queue_nor_while_evaluating() -> None:
    own, theirs = pooled(4, 0)
    none, evaluated = contrastive(queue=0), contrastive(queue=6)
    evaluated.module.eval()
    for loss in (none, evaluated):
        loss(CapturedActivations(last=own), CapturedActivations(last=theirs))
        assert loss.state_dict()["queue"] is None


@pytest.mark.parametrize("kind", ["infonce", "crd"])
def test_gradients_reach_both_projections_and_the_student_only(kind: str) -> None:
    loss = contrastive(kind=kind, **({"examples": 50} if kind == "crd" else {}))
    own, theirs = (x.requires_grad_() for x in pooled(4, 0))
    loss(CapturedActivations(last=own), CapturedActivations(last=theirs)).backward()
    assert own.grad is not None and own.grad.any() and theirs.grad is None
    assert all(p.grad is not None and p.grad.any() for p in loss.module.parameters())


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_represents_the_same_example(pooling: str, side: str) -> None:
    lengths, longest = (2, 4, 3), 5
    generator = torch.Generator().manual_seed(0)
    examples = [[torch.randn(length, width, generator=generator) for width in WIDTHS] for length in lengths]
    of = {"mean": lambda x: x.mean(0), "first": lambda x: x[0], "last": lambda x: x[-1]}[pooling]
    own, theirs = (torch.stack([of(example[s]) for example in examples]) for s in (0, 1))
    expected = contrastive(pooling=pooling)(CapturedActivations(last=own), CapturedActivations(last=theirs))
    padded = [torch.full((len(lengths), longest, width), 7.0) for width in WIDTHS]
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(longest - length, longest)
        mask[row, where] = True
        for target, values in zip(padded, examples[row], strict=True):
            target[row, where] = values
    loss = contrastive(pooling=pooling)
    got = loss(CapturedActivations(last=padded[0], token_mask=mask), CapturedActivations(last=padded[1]))
    torch.testing.assert_close(got, expected)
