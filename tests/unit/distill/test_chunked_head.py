"""Sums over chunks of logits: exact whatever their factors do, and no second pass while these are steady."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_compress.distill.chunked_head import RowLoss, UpstreamPredictor, chunked_sums, factor_between

ROWS, WIDTH, VOCABULARY, CHUNK = 11, 5, 7, 4


class CountingHead:
    """A plain Linear that counts how many rows of logits it was asked for."""

    def __init__(self) -> None:
        self.module = nn.Linear(WIDTH, VOCABULARY)
        self.chunk = CHUNK
        self.predictors: dict[int, UpstreamPredictor] = {}
        self.rows = 0

    def parameters(self) -> Any:
        return self.module.parameters()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rows += len(hidden)
        assert len(hidden) <= CHUNK
        return self.module(hidden)

    def run(self, job: Any, hidden: torch.Tensor) -> torch.Tensor:
        return job(hidden)


def losses(target: torch.Tensor, wanted: torch.Tensor) -> list[RowLoss]:
    def task(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        return F.cross_entropy(logits, target[rows], reduction="sum")

    def imitation(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        return F.kl_div(
            logits.log_softmax(-1), wanted[rows].log_softmax(-1), reduction="sum", log_target=True
        )

    return [RowLoss(task, averaged_over=len(target)), RowLoss(imitation)]


def gradients_of(total: torch.Tensor, hidden: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, [hidden, *module.parameters()]))


@pytest.mark.parametrize(
    ("factors", "passes"),
    [
        ([(0.5, 2.0)] * 5, [2, 2, 1, 1, 1]),
        ([(0.5, 2.0), (0.5, 2.0), (0.1, 2.0), (0.1, 2.0), (0.1, 2.0)], [2, 2, 2, 2, 1]),
        ([(1.0, 1.0), (64.0, 64.0), (2.0, 2.0), (-3.0, -3.0), (0.0, 0.0)], [2, 2, 1, 1, 1]),
        ([(1.0, 1.0 - 0.1 * step) for step in range(5)], [2, 2, 2, 2, 2]),
        ([(1.0, 0.0)] * 5, [2, 2, 2, 2, 2]),
    ],
    ids=["steady", "a jump", "a common factor", "moving", "nothing to compare with"],
)
def test_gradients_are_exact_and_a_steady_factor_saves_the_second_pass(
    factors: list[tuple[float, float]], passes: list[int]
) -> None:
    torch.manual_seed(0)
    head = CountingHead()
    for (a, b), expected_passes in zip(factors, passes, strict=True):
        hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
        target, wanted = torch.randint(0, VOCABULARY, (ROWS,)), torch.randn(ROWS, VOCABULARY)
        both = losses(target, wanted)
        head.rows = 0
        sums = chunked_sums(head, hidden, lambda logits: logits * 0.7, both)
        got = gradients_of(a * sums[0] / ROWS + b * sums[1], hidden, head.module)
        assert head.rows == expected_passes * ROWS
        logits = head.module(hidden) * 0.7
        plain = [loss.of_rows(logits, slice(0, ROWS)) for loss in both]
        torch.testing.assert_close(sums.detach(), torch.stack(plain).detach())
        for ours, theirs in zip(
            got, gradients_of(a * plain[0] / ROWS + b * plain[1], hidden, head.module), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


def test_batches_of_other_sizes_keep_the_forecast() -> None:
    head = CountingHead()
    for rows, passes in ((11, 2), (8, 2), (5, 1), (9, 1)):
        hidden = torch.randn(rows, WIDTH, requires_grad=True)
        both = losses(torch.randint(0, VOCABULARY, (rows,)), torch.randn(rows, VOCABULARY))
        head.rows = 0
        sums = chunked_sums(head, hidden, lambda logits: logits, both)
        (0.5 * sums[0] / rows + sums[1]).backward()
        assert head.rows == passes * rows


def test_a_forecast_is_no_licence_to_ignore_infinities() -> None:
    steady = torch.tensor([1.0, 2.0])
    assert factor_between(steady, steady * 3) == 3
    assert factor_between(steady, torch.tensor([1.0, 2.1])) is None
    assert factor_between(torch.tensor([torch.inf, 1.0]), steady) is None
    assert factor_between(torch.tensor([1.0, 0.0]), steady) is None
    assert factor_between(steady, torch.tensor([torch.nan, 2.0])) is None
    assert factor_between(torch.ones(1), steady) is None


def test_no_rows_at_all() -> None:
    head = CountingHead()
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    sums = chunked_sums(
        head, hidden, lambda logits: logits, losses(torch.zeros(0).long(), torch.zeros(0, VOCABULARY))
    )
    assert torch.equal(sums.detach(), torch.zeros(2))
    sums.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, WIDTH)
