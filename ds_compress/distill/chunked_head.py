"""Sums of losses over logits, of which only a chunk exists at a time, forward and backward.

A chunk of logits is computed, its losses and their gradients are taken, and it is freed; the memory is one chunk,
whatever batch, sequence and vocabulary are. The gradient of several losses together is known in forward only if the
upstream gradients are, so they are predicted from the last steps (`UpstreamPredictor`). Where the prediction is wrong,
as while a loss weight changes, backward computes every chunk again: one more matrix product with the head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


class RowLoss:
    """A loss that is a sum over rows of logits.

    Args:
        of_rows: (logits of some rows, which rows) -> the sum over them, a scalar.
        around: calls its argument while what `of_rows` needs is available, such as a sharded teacher's head.
        averaged_over: by what number the sum will probably be divided.
    """

    def __init__(
        self,
        of_rows: Callable[[torch.Tensor, slice], torch.Tensor],
        around: Callable[[Callable[[], None]], None] | None = None,
        averaged_over: torch.Tensor | float = 1.0,
    ) -> None:
        self.of_rows = of_rows
        self.around = around
        self.averaged_over = averaged_over


class UpstreamPredictor:
    """Predicts the upstream gradients of a pass's sums from those of the passes before.

    Losses usually have the same factors at every step, apart from the number of rows that they are averaged over. After
    two equal steps there is a prediction.
    """

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None
        self._steady = False

    def predict(self, averaged_over: torch.Tensor) -> torch.Tensor | None:
        """fp32 [losses], or None where the last steps differed."""
        if not self._steady or self._last is None:
            return None
        return self._last / averaged_over

    def update(self, gradient: torch.Tensor, averaged_over: torch.Tensor) -> None:
        now = gradient * averaged_over
        self._steady = self._last is not None and factor_between(self._last, now) is not None
        self._last = now


def factor_between(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    """The number that `one` is multiplied by to give `other`; None where there is none."""
    if one.shape != other.shape:
        return None
    factor = other[-1] / one[-1]
    alike = torch.isclose(one * factor, other, rtol=1e-5, atol=0.0).all()
    # One question: on a GPU each is a synchronization, in the middle of backward.
    return factor if bool(alike & (one[-1] != 0) & torch.isfinite(one).all()) else None


class Head(Protocol):
    """What computes logits from hidden states: see `lazy_head.LazyHead`."""

    chunk: int
    vocabulary: int
    predictors: dict[int, UpstreamPredictor]

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def plain(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def run(self, job: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor: ...

    def around(self, job: Callable[[], None]) -> None: ...

    def dtype(self, hidden: torch.Tensor) -> torch.dtype: ...

    def warn_materialized(self, shape: torch.Size) -> None: ...


def chunked_sums(
    head: Head,
    hidden: torch.Tensor,
    operations: Callable[[torch.Tensor], torch.Tensor],
    losses: Sequence[RowLoss],
) -> torch.Tensor:
    """fp32 [len(losses)]: each of `losses` summed over all rows of `operations(head(hidden))`.

    Args:
        hidden: [rows, width]; gets a gradient, and so do the head's parameters that want one.
        operations: element-wise.
    """

    def values(rows_of_hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        logits = operations(head.logits(rows_of_hidden))
        return torch.stack([loss.of_rows(logits, rows).float() for loss in losses])

    def around(loop: Callable[[], None]) -> None:
        for loss in losses:
            if loss.around is not None:
                loop = functools.partial(loss.around, loop)
        loop()

    def job(hidden: torch.Tensor) -> torch.Tensor:
        divisors = torch.stack([_on(hidden.device, loss.averaged_over) for loss in losses])
        predictor = head.predictors.setdefault(len(losses), UpstreamPredictor())
        work = _Pass(values, around, head.chunk, divisors, predictor)
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
            return work.forward(hidden)
        result: torch.Tensor = _ChunkedHead.apply(work, hidden, *trained)
        return result

    return head.run(job, hidden)


def _on(device: torch.device, number: torch.Tensor | float) -> torch.Tensor:
    """fp32 scalar; filled on the device, because a copy to it is a synchronization."""
    if isinstance(number, torch.Tensor):
        return number.to(device, torch.float32)
    return torch.full((), number, device=device)


@dataclass(frozen=True)
class _Pass:
    """One way through all rows: `values` gives the losses of a chunk, `around` calls a loop over the chunks."""

    values: Callable[[torch.Tensor, slice], torch.Tensor]
    around: Callable[[Callable[[], None]], None]
    chunk: int
    averaged_over: torch.Tensor
    predictor: UpstreamPredictor

    @torch.no_grad()
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The sums."""
        total = torch.zeros_like(self.averaged_over)
        self._loop(hidden, lambda rows: total.add_(self.values(hidden[rows], rows)))
        return total

    def with_gradients(
        self, hidden: torch.Tensor, trained: Sequence[nn.Parameter], gradient: torch.Tensor, of_hidden: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """The sums, and for `gradient` of them those of the hidden states (if wanted) and of `trained`."""
        total = torch.zeros_like(self.averaged_over)
        by_rows = torch.zeros_like(hidden) if of_hidden else None
        # Summed in fp32: in 16 bits the last chunks would hardly count.
        by_weights = [torch.zeros_like(p, dtype=torch.float32) for p in trained]

        def each_chunk(rows: slice) -> None:
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_(of_hidden)
                value = self.values(part, rows)
            total.add_(value.detach())
            inputs = ([part] if of_hidden else []) + list(trained)
            found = list(torch.autograd.grad(value, inputs, gradient, allow_unused=True))
            if by_rows is not None and (own := found.pop(0)) is not None:
                by_rows[rows] = own
            for weight, share in zip(by_weights, found, strict=True):
                if share is not None:
                    weight.add_(share)

        self._loop(hidden, each_chunk)
        return total, by_rows, [weight.to(p.dtype) for weight, p in zip(by_weights, trained, strict=True)]

    def _loop(self, hidden: torch.Tensor, each_chunk: Callable[[slice], object]) -> None:
        def loop() -> None:
            for start in range(0, hidden.shape[0], self.chunk):
                each_chunk(slice(start, min(start + self.chunk, hidden.shape[0])))

        self.around(loop)


class _ChunkedHead(torch.autograd.Function):
    """`work` with gradients; a chunk's graph lives only while its gradients are taken."""

    @staticmethod
    def forward(ctx: Any, work: _Pass, hidden: torch.Tensor, *trained: nn.Parameter) -> torch.Tensor:
        # Not save_for_backward: what shards the parameters changes their data in between.
        ctx.work, ctx.trained = work, trained
        ctx.autocast = autocast_of_now(hidden.device.type)
        ctx.save_for_backward(hidden)
        ctx.predicted = work.predictor.predict(work.averaged_over)
        if ctx.predicted is None:
            return work.forward(hidden)
        total, *ctx.gradients = work.with_gradients(hidden, trained, ctx.predicted, ctx.needs_input_grad[1])
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        (hidden,) = ctx.saved_tensors
        work: _Pass = ctx.work
        work.predictor.update(gradient, work.averaged_over)
        factor = None if ctx.predicted is None else factor_between(ctx.predicted, gradient)
        if factor is None:
            with ctx.autocast():
                _, of_hidden, of_trained = work.with_gradients(
                    hidden, ctx.trained, gradient, ctx.needs_input_grad[1]
                )
        else:
            of_hidden, of_trained = ctx.gradients
            for found in ([] if of_hidden is None else [of_hidden], of_trained):
                for tensor in found:
                    tensor.mul_(factor)
            # A second backward of the same graph scales them from here.
            ctx.predicted = gradient.clone()
        return None, of_hidden, *of_trained


def autocast_of_now(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the autocast context that is active here; backward runs outside of it."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    # Its cache of cast weights would keep the graph of one chunk alive in the next.
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
