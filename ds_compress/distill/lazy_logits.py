"""Logits that are not computed until something needs them, and then a few rows at a time.

An LM head turns hidden states of width 576 into logits of width 49,152. A batch of them, their softmax and
their gradients are most of the memory of a distillation step, and all that is ever wanted of them are a few
sums. So while a student trains, `lazy_head` makes its head return `LazyLogits`: the hidden states, and the
element-wise operations that a model applies to its logits (scaling, soft-capping, a cast), in a list. Taking rows
and flattening act on the hidden states. `F.cross_entropy` of it, and the divergence from the teacher, go
through `ChunkedHead`, in one pass over the rows when they can. Anything else gets the real logits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from ds_compress.distill.chunked_head import RowLosses, Upstream, autocast_of_now, chunked_sums

logger = logging.getLogger("ds_compress")

ElementWise = Callable[[torch.Tensor], torch.Tensor]


class LazyLogits:
    """Logits [..., vocabulary] of `hidden` [..., width] under `head`, with `operations` applied one by one.

    It stands in for a tensor: `torch` functions accept it. `Imitation`, when there is one, is computed in the same
    pass as the cross entropy.
    """

    def __init__(
        self,
        head: LazyHead,
        hidden: torch.Tensor,
        operations: tuple[ElementWise, ...] = (),
        imitation: Imitation | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
        is_detached: bool = False,
    ) -> None:
        self._head = head
        self._hidden = hidden
        self._operations = operations
        self._imitation = imitation
        self._autocast = autocast or autocast_of_now(hidden.device.type)
        self._is_detached = is_detached

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

    # -- operations that are put off -------------------------------------------------------------------

    def _with(self, hidden: torch.Tensor | None = None, **changed: Any) -> LazyLogits:
        kept = {
            "operations": self._operations,
            "imitation": self._imitation,
            "autocast": self._autocast,
            "is_detached": self._is_detached,
            **changed,
        }
        return LazyLogits(self._head, self._hidden if hidden is None else hidden, **kept)

    def _then(self, operation: ElementWise) -> LazyLogits:
        return self._with(operations=(*self._operations, operation))

    def _of(self, hidden: torch.Tensor) -> LazyLogits:
        # The imitation covers every row, in order: it may join a pass over just those.
        same_rows = hidden.numel() == self._hidden.numel()
        return self._with(hidden, imitation=self._imitation if same_rows else None)

    def float(self) -> LazyLogits:
        return self._then(_Cast((torch.float32,), {}))

    def to(self, *args: Any, **kwargs: Any) -> LazyLogits:
        return self._then(_Cast(args, kwargs))

    def contiguous(self) -> LazyLogits:
        return self

    def detach(self) -> LazyLogits:
        return self._with(self._hidden.detach(), imitation=None, is_detached=True)

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
        """Of every row: a model that forbids some tokens does so."""
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

    def _names_last(self, parts: tuple[Any, ...]) -> bool:
        """Whether the last of these indices is one of categories."""
        spread = any(part is Ellipsis for part in parts[:-1])
        return bool(parts) and parts[-1] is not Ellipsis and (spread or len(parts) == self.ndim)

    def __mul__(self, other: Any) -> Any:
        return self._scaled(other, torch.mul)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._scaled(other, torch.div)

    def _scaled(self, other: Any, operation: Callable[..., torch.Tensor]) -> Any:
        # A factor that is learned needs a gradient, which a pass in chunks has for the head only.
        is_scalar = isinstance(other, torch.Tensor) and other.dim() == 0 and not other.requires_grad
        if isinstance(other, (int, float)) or is_scalar:
            return self._then(lambda logits: operation(logits, other))
        return operation(self.materialize(), other)

    # -- everything else -------------------------------------------------------------------------------

    def materialize(self) -> torch.Tensor:
        """The real logits, whole."""
        self._head.warn_that_whole(self.shape)
        with self._autocast(), self._gradients():
            return self._apply(self._head.plain(self._hidden))

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

    def says_the_same_as(self, other: LazyLogits) -> bool:
        """Whether the same was done to both but for casts. (A script may scale its logits for its own loss.)"""
        own, theirs = ([op for op in x._operations if not isinstance(op, _Cast)] for x in (self, other))
        return own == theirs

    def _apply(self, logits: torch.Tensor) -> torch.Tensor:
        for operation in self._operations:
            logits = operation(logits)
        return logits

    # -- sums over rows --------------------------------------------------------------------------------

    def sums(self, losses: Sequence[RowLosses]) -> torch.Tensor:
        """fp32 [len(losses)]: each loss summed over all rows, a chunk of logits at a time."""
        rows = self._hidden.reshape(-1, self._hidden.shape[-1])
        with self._autocast(), self._gradients():
            return chunked_sums(self._head, rows, self._apply, losses)

    def chunk_of(self, rows: slice) -> torch.Tensor:
        """Real logits of some rows of a teacher, without a graph; inside `around` only."""
        with torch.no_grad(), self._autocast():
            return self._apply(self._head.logits(self._hidden[rows]))

    def around(self, job: Callable[[], None]) -> None:
        """Calls `job` while the head's weights are whole."""
        self._head.around(job)

    def each_chunk(self, use: Callable[[torch.Tensor], None]) -> None:
        """Calls `use` with the real logits of all rows, a chunk [rows, vocabulary] at a time; without a graph."""
        flat = self._of(self._hidden.reshape(-1, self._hidden.shape[-1]))
        rows, chunk = flat._hidden.shape[0], self._head.chunk

        def loop() -> None:
            for start in range(0, rows, chunk):
                use(flat.chunk_of(slice(start, min(start + chunk, rows))))

        self.around(loop)


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
    """`logits.to(*args, **kwargs)`, an operation that leaves the prediction what it is."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.to(*self.args, **self.kwargs)


class Imitation:
    """The divergence from the teacher that is waiting for a pass over the student's logits.

    Args:
        losses: its sum over rows of the student's logits, see `RowLosses`.
    """

    def __init__(self, losses: RowLosses) -> None:
        self.losses = losses
        self._value: torch.Tensor | None = None
        self._of: LazyLogits | None = None

    def found(self, value: torch.Tensor, of: LazyLogits) -> None:
        """`value` was computed beside something else of these logits."""
        self._value, self._of = value, of

    @property
    def is_pending(self) -> bool:
        return self._value is None

    def value(self, logits: LazyLogits) -> torch.Tensor:
        """The scalar, from an earlier pass over logits that say the same or one of its own over `logits`."""
        if self._value is None or (self._of is not None and not self._of.says_the_same_as(logits)):
            self.found(logits.sums([self.losses])[0], logits)
        assert self._value is not None
        return self._value


class LazyHead:
    """Makes `module`, the LM head of a model, return `LazyLogits` while `is_on`.

    By hooks alone: the module's own forward sees one row, so that class, weights and whatever shards them stay as
    they are. Ours run last before it and first after it.

    Args:
        module: anything whose forward takes hidden states [..., width] and returns logits [..., vocabulary].
        vocabulary: size of that last dimension.
        chunk: rows of logits that exist at a time.
    """

    def __init__(self, module: nn.Module, vocabulary: int, chunk: int) -> None:
        self.module = module
        self.vocabulary = vocabulary
        self.chunk = chunk
        self.is_on = False
        self.imitation: Imitation | None = None
        self.upstream: dict[int, Upstream] = {}
        self._warned = False
        self._job: Callable[[torch.Tensor], Any] | None = None
        self._given: list[torch.Tensor] = []
        self._one_row = torch.empty(0)
        self._handles = [
            module.register_forward_pre_hook(torch.compiler.disable(self._take_input), with_kwargs=True),
            module.register_forward_hook(torch.compiler.disable(self._give_output), prepend=True),
            module.register_forward_hook(torch.compiler.disable(_unwrapped)),
        ]

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.module.parameters()

    def plain(self, hidden: torch.Tensor) -> torch.Tensor:
        """Real logits of `hidden`, whole."""
        return self.run(self.logits, hidden)

    def run(self, job: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """`job(hidden)`, as if it were this module's forward: what shards its weights makes them whole for it."""
        before, self._job = self._job, job
        try:
            result: torch.Tensor = self.module(hidden)
        finally:
            self._job = before
        return result

    def around(self, job: Callable[[], None]) -> None:
        """Calls `job` while the module's weights are whole."""
        self.run(lambda _: _Placeholder(job()), self._one_row)  # type: ignore[arg-type, return-value, func-returns-value]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Real logits of a chunk; inside `run` or `around` only."""
        result: torch.Tensor = type(self.module).forward(self.module, hidden)
        return result

    def dtype(self, hidden: torch.Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(hidden.device.type):
            return torch.get_autocast_dtype(hidden.device.type)
        return hidden.dtype

    def warn_that_whole(self, shape: torch.Size) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "ds_compress: logits of shape %s are computed whole, because something other than a cross entropy "
                "asked for them",
                tuple(shape),
            )

    def _take_input(
        self, module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
    ) -> Any:
        if self._job is None and not self.is_on:
            return None
        given = args[0] if args else next(iter(kwargs.values()))
        self._given.append(given)
        self._one_row = given.detach().flatten(0, -2)[:1]
        return (self._one_row,), {}

    def _give_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._job is None and not self.is_on:
            return None
        hidden, job = self._given.pop(), self._job
        if job is None:
            return _Placeholder(LazyLogits(self, hidden, imitation=self.imitation))
        # What it calls in turn may come back to this module.
        self._job = None
        return job(hidden)


class _Placeholder(dict[str, Any]):
    """Carries something past hooks that look for tensors in what a module returns: it shows them none.

    ZeRO-3 would otherwise make the head's weights whole once more in backward.
    """

    def __init__(self, content: Any) -> None:
        super().__init__()
        self.content = content


def _unwrapped(module: nn.Module, args: Any, output: Any) -> Any:
    return output.content if isinstance(output, _Placeholder) else None


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
    """The cross entropy in chunks; None for what only whole logits can answer."""
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
    task = RowLosses(of_rows, averaged_over=predicted.clamp(min=1))
    imitation = input._imitation
    if imitation is not None and imitation.is_pending:
        total, imitated = input.sums([task, imitation.losses])
        imitation.found(imitated, input)
    else:
        (total,) = input.sums([task])
    # As torch does it: nothing to predict is 0 / 0.
    return total / predicted if reduction == "mean" else total
