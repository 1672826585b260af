"""Sums of losses over logits, of which only a chunk exists at a time, forward and backward.

Forward computes a chunk of logits, its losses, and forgets it. Backward computes it again, and from it the
gradients of the chunk's hidden states and a share of those of the head's weights. The additional work is one
more product with the head; the memory is one chunk, whatever batch, sequence and vocabulary are. (Storing gradients
in forward, as others do, would need one copy of the head's gradient for each loss whose factor is not known
yet.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


class RowLosses:
    """A loss that is a sum over rows of logits.

    Args:
        of_rows: (logits of some rows, which rows) -> the sum over them, a scalar.
        around: calls its argument while what `of_rows` needs is there, such as a sharded teacher's head.
    """

    def __init__(
        self,
        of_rows: Callable[[torch.Tensor, slice], torch.Tensor],
        around: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self.of_rows = of_rows
        self.around = around


class Head(Protocol):
    """What turns hidden states into logits: see `LazyHead`."""

    chunk: int

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def run(self, job: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor: ...


def chunked_sums(
    head: Head,
    hidden: torch.Tensor,
    operations: Callable[[torch.Tensor], torch.Tensor],
    losses: Sequence[RowLosses],
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
        work = _Pass(values, around, head.chunk, len(losses))
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
            return work.forward(hidden)
        result: torch.Tensor = _ChunkedHead.apply(work, hidden, *trained)
        return result

    return head.run(job, hidden)


@dataclass(frozen=True)
class _Pass:
    """One way through all rows: `values` gives the losses of a chunk, `around` calls a loop over the chunks."""

    values: Callable[[torch.Tensor, slice], torch.Tensor]
    around: Callable[[Callable[[], None]], None]
    chunk: int
    losses: int

    @torch.no_grad()
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(self.losses, dtype=torch.float32, device=hidden.device)

        def loop() -> None:
            nonlocal total
            for rows in self._chunks(hidden):
                total = total + self.values(hidden[rows], rows)

        self.around(loop)
        return total

    def backward(self, each_chunk: Callable[[slice], None], hidden: torch.Tensor) -> None:
        def loop() -> None:
            for rows in self._chunks(hidden):
                each_chunk(rows)

        self.around(loop)

    def _chunks(self, hidden: torch.Tensor) -> Iterator[slice]:
        rows = hidden.shape[0]
        return (slice(start, min(start + self.chunk, rows)) for start in range(0, rows, self.chunk))


class _ChunkedHead(torch.autograd.Function):
    """`work` with gradients; a chunk's graph lives only while its gradients are taken."""

    @staticmethod
    def forward(ctx: Any, work: _Pass, hidden: torch.Tensor, *trained: nn.Parameter) -> torch.Tensor:
        # Not save_for_backward: whoever shards the parameters changes their data in between.
        ctx.work, ctx.trained = work, trained
        ctx.autocast = autocast_of_now(hidden.device.type)
        ctx.save_for_backward(hidden)
        return work.forward(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        (hidden,) = ctx.saved_tensors
        wants_hidden = ctx.needs_input_grad[1]
        of_hidden = torch.zeros_like(hidden) if wants_hidden else None
        # Summed in fp32: in 16 bits the last chunks would hardly count.
        of_trained = [torch.zeros_like(p, dtype=torch.float32) for p in ctx.trained]

        def each_chunk(rows: slice) -> None:
            with torch.enable_grad(), ctx.autocast():
                part = hidden[rows].detach().requires_grad_(wants_hidden)
                value = ctx.work.values(part, rows)
            inputs = ([part] if wants_hidden else []) + list(ctx.trained)
            found = list(torch.autograd.grad(value, inputs, gradient, allow_unused=True))
            if of_hidden is not None and (own := found.pop(0)) is not None:
                of_hidden[rows] = own
            for total, share in zip(of_trained, found, strict=True):
                if share is not None:
                    total += share

        ctx.work.backward(each_chunk, hidden)
        cast = [total.to(p.dtype) for total, p in zip(of_trained, ctx.trained, strict=True)]
        return None, of_hidden, *cast


def autocast_of_now(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the autocast context that is in force here; backward runs outside of it."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    # Its cache of cast weights would keep the graph of one chunk alive in the next.
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
