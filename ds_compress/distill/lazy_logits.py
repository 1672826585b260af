"""Logits that are computed when they are needed, a chunk of rows at a time.

An LM head turns hidden states of width 576 into logits of width 49,152. A batch of them, their softmax and their
gradients are most of the memory of a distillation step, and only a few sums of them are used. So while a student
trains, its head returns `LazyLogits` (see `lazy_head`): the hidden states, and a list of the element-wise operations
that a model applies to its logits (scaling, soft-capping, a cast). Taking rows and flattening act on the hidden states.
`F.cross_entropy` of it, and the divergence from the teacher, are computed by `chunked_head`, in one pass over the rows
where possible. Anything else materializes the logits, once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from ds_compress.distill.chunked_head import Head, RowLoss, autocast_of_now, chunked_sums
from ds_compress.distill.pending_loss import PendingLoss

ElementWise = Callable[[torch.Tensor], torch.Tensor]


class LazyLogits:
    """Logits [..., vocabulary] of `hidden` [..., width] under `head`, with `operations` applied one by one.

    A stand-in for a tensor: `torch` functions accept it. `pending_loss`, if any, is computed in the same pass as the
    cross entropy.
    """

    def __init__(
        self,
        head: Head,
        hidden: torch.Tensor,
        operations: tuple[ElementWise, ...] = (),
        pending_loss: PendingLoss | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
        is_detached: bool = False,
    ) -> None:
        self._head = head
        self._hidden = hidden
        self._operations = operations
        self._pending_loss = pending_loss
        self._autocast = autocast or autocast_of_now(hidden.device.type)
        self._is_detached = is_detached
        self._materialized: torch.Tensor | None = None

    # -- what is known without computing ---------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._head.vocabulary))

    @property
    def ndim(self) -> int:
        return self._hidden.dim()

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    @property
    def dtype(self) -> torch.dtype:
        with self._autocast():
            probe = self._hidden.new_empty(0, dtype=self._head.dtype(self._hidden))
        return self._apply(probe).dtype

    @property
    def requires_grad(self) -> bool:
        learns = self._hidden.requires_grad or any(p.requires_grad for p in self._head.parameters())
        return learns and not self._is_detached

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    # -- deferred operations ---------------------------------------------------------------------------

    def _with(self, hidden: torch.Tensor | None = None, **changed: Any) -> LazyLogits:
        kept = {
            "operations": self._operations,
            "pending_loss": self._pending_loss,
            "autocast": self._autocast,
            "is_detached": self._is_detached,
            **changed,
        }
        return LazyLogits(self._head, self._hidden if hidden is None else hidden, **kept)

    def _then(self, operation: ElementWise) -> LazyLogits:
        return self._with(operations=(*self._operations, operation))

    def _of(self, hidden: torch.Tensor) -> LazyLogits:
        # The pending loss is over every row, in order: it may join a pass over exactly those.
        same_rows = hidden.numel() == self._hidden.numel()
        return self._with(hidden, pending_loss=self._pending_loss if same_rows else None)

    def float(self) -> LazyLogits:
        return self._then(_Cast((torch.float32,), {}))

    def to(self, *args: Any, **kwargs: Any) -> LazyLogits:
        return self._then(_Cast(args, kwargs))

    def contiguous(self) -> LazyLogits:
        return self

    def detach(self) -> LazyLogits:
        return self._with(self._hidden.detach(), pending_loss=None, is_detached=True)

    def view(self, *shape: Any) -> Any:
        return self.reshape(*shape)

    def reshape(self, *shape: Any) -> Any:
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape
        if not all(isinstance(size, int) for size in sizes) or sizes[-1] != self._head.vocabulary:
            return self.materialize().reshape(*shape)
        return self._of(self._hidden.reshape(*sizes[:-1], self._hidden.shape[-1]))

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        takes_rows = all(part is Ellipsis or isinstance(part, slice) for part in parts)
        whole_last = not self._names_last(parts) or parts[-1] == slice(None)
        if not takes_rows or not whole_last:
            return self.materialize()[index]
        return self._of(self._hidden[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        """Sets categories of every row to a number, as models do that forbid some tokens."""
        parts = index if isinstance(index, tuple) else (index,)
        every_row = all(part is Ellipsis or part == slice(None) for part in parts[:-1])
        if not every_row or not self._names_last(parts) or isinstance(value, torch.Tensor):
            raise TypeError(
                "distillation: these logits are not computed yet, so only whole categories can be set, to a number; "
                "assign into logits.clone(), or set losses.logits.chunk_tokens to 0"
            )
        last = parts[-1]

        def with_value(logits: torch.Tensor) -> torch.Tensor:
            changed = logits.clone()
            changed[..., last] = value
            return changed

        self._operations = (*self._operations, with_value)
        self._materialized = None

    def _names_last(self, parts: tuple[Any, ...]) -> bool:
        """Whether the last of these indices selects categories."""
        has_ellipsis = any(part is Ellipsis for part in parts[:-1])
        return bool(parts) and parts[-1] is not Ellipsis and (has_ellipsis or len(parts) == self.ndim)

    def __mul__(self, other: Any) -> Any:
        return self._scaled(other, torch.mul)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._scaled(other, torch.div)

    def _scaled(self, other: Any, operation: Callable[..., torch.Tensor]) -> Any:
        # A learned factor needs a gradient, which a pass in chunks computes for the head only.
        is_scalar = isinstance(other, torch.Tensor) and other.dim() == 0 and not other.requires_grad
        if isinstance(other, (int, float)) or is_scalar:
            return self._then(lambda logits: operation(logits, other))
        return operation(self.materialize(), other)

    # -- everything else -------------------------------------------------------------------------------

    def materialize(self) -> torch.Tensor:
        """All logits as a tensor. Computed by the first call, with a warning, and kept: loops over rows pay once."""
        kept = self._materialized
        # Without a graph, it serves as long as nobody wants one.
        if kept is not None and (kept.requires_grad or not (torch.is_grad_enabled() and self.requires_grad)):
            return kept
        self._head.warn_materialized(self.shape)
        with self._autocast(), self._gradients():
            self._materialized = self._apply(self._head.plain(self._hidden))
        return self._materialized

    def _gradients(self) -> AbstractContextManager[Any]:
        return torch.no_grad() if self._is_detached else contextlib.nullcontext()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.materialize(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.cross_entropy and isinstance(args[0] if args else kwargs.get("input"), LazyLogits):
            result = _cross_entropy(*args, **kwargs)
            if result is not None:
                return result
        if function in (torch.tanh, torch.Tensor.tanh) and len(args) == 1 and not kwargs:
            return args[0]._then(torch.tanh)
        plain, named = tree_map_only(LazyLogits, LazyLogits.materialize, (tuple(args), kwargs))
        return function(*plain, **named)

    def has_same_values_as(self, other: LazyLogits) -> bool:
        """Whether the same operations were applied to both, but for casts. (A script may scale logits for its loss.)"""
        mine, others = ([op for op in x._operations if not isinstance(op, _Cast)] for x in (self, other))
        return mine == others

    def _apply(self, logits: torch.Tensor) -> torch.Tensor:
        return _applied(self._operations, logits)

    # -- sums over rows --------------------------------------------------------------------------------

    def sums(self, losses: Sequence[RowLoss]) -> torch.Tensor:
        """fp32 [len(losses)]: each loss summed over all rows, a chunk of logits at a time."""
        rows = self._hidden.reshape(-1, self._hidden.shape[-1])
        # Not `self._apply`: the graph keeps what computes it, and this knows, by `pending_loss`, a result of the graph.
        # No collector of garbage sees such a circle.
        operations = functools.partial(_applied, self._operations)
        with self._autocast(), self._gradients():
            return chunked_sums(self._head, rows, operations, losses)

    def chunk_of(self, rows: slice) -> torch.Tensor:
        """Logits of some rows of a teacher, without a graph; inside `around` only."""
        with torch.no_grad(), self._autocast():
            return self._apply(self._head.logits(self._hidden[rows]))

    def around(self, job: Callable[[], None]) -> None:
        """Calls `job` while the head's weights are gathered."""
        self._head.around(job)

    def each_chunk(self, use: Callable[[torch.Tensor], None]) -> None:
        """Calls `use` with the logits of all rows, a chunk [rows, vocabulary] at a time; without a graph."""
        flat = self._of(self._hidden.reshape(-1, self._hidden.shape[-1]))
        rows, chunk = flat._hidden.shape[0], self._head.chunk

        def loop() -> None:
            for start in range(0, rows, chunk):
                use(flat.chunk_of(slice(start, min(start + chunk, rows))))

        self.around(loop)


def _applied(operations: Sequence[ElementWise], logits: torch.Tensor) -> torch.Tensor:
    for operation in operations:
        logits = operation(logits)
    return logits


def _operator(name: str) -> Callable[..., Any]:
    return lambda logits, *others: getattr(logits.materialize(), name)(*others)


# Python looks operators up in the class, so __getattr__ never sees them.
for _name in (
    "add",
    "radd",
    "sub",
    "rsub",
    "rtruediv",
    "floordiv",
    "mod",
    "pow",
    "rpow",
    "matmul",
    "neg",
    "abs",
):
    setattr(LazyLogits, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(LazyLogits, f"__{_name}__", _operator(f"__{_name}__"))


@dataclass(frozen=True)
class _Cast:
    """`logits.to(*args, **kwargs)`, an operation that does not change the values."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.to(*self.args, **self.kwargs)


def _cross_entropy(
    input: LazyLogits,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor | None:
    """The cross entropy in chunks; None where it needs all logits."""
    is_a_sum = reduction in ("mean", "sum") and size_average is None and reduce is None
    if (
        not is_a_sum
        or weight is not None
        or input.ndim != 2
        or target.dim() != 1
        or target.is_floating_point()
    ):
        return None

    def of_rows(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        return F.cross_entropy(
            logits,
            target[rows],
            ignore_index=ignore_index,
            reduction="sum",
            label_smoothing=label_smoothing,
        )

    predicted = (target != ignore_index).sum()
    task = RowLoss(of_rows, averaged_over=predicted.clamp(min=1))
    pending = input._pending_loss
    if pending is not None and pending.is_pending:
        total, value = input.sums([task, pending.row_loss])
        pending.resolve(value, input)
    else:
        (total,) = input.sums([task])
    # As in torch, nothing to predict is 0 / 0.
    return total / predicted if reduction == "mean" else total
