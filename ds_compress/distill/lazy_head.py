"""An LM head that returns `LazyLogits` while it is on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ds_compress.distill.chunked_head import UpstreamPredictor
from ds_compress.distill.lazy_logits import LazyLogits
from ds_compress.distill.pending_loss import PendingLoss

logger = logging.getLogger("ds_compress")


class LazyHead:
    """Makes `module`, the LM head of a model, return `LazyLogits` while `is_on`.

    By hooks alone: the module's own forward computes one row, so that its class, its weights and what shards them stay
    as they are. Our hooks run last before it and first after it.

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
        self.pending_loss: PendingLoss | None = None
        self.predictors: dict[int, UpstreamPredictor] = {}
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
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.module.parameters()

    def plain(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of all of `hidden`."""
        return self.run(self.logits, hidden)

    def run(self, job: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """`job(hidden)`, run as the forward of this module: what shards its weights gathers them for it."""
        before, self._job = self._job, job
        try:
            result: torch.Tensor = self.module(hidden)
        finally:
            self._job = before
        return result

    def around(self, job: Callable[[], None]) -> None:
        """Calls `job` while the module's weights are gathered."""
        self.run(lambda _: _Placeholder(job()), self._one_row)  # type: ignore[arg-type, return-value, func-returns-value]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of a chunk; inside `run` or `around` only."""
        result: torch.Tensor = type(self.module).forward(self.module, hidden)
        return result

    def dtype(self, hidden: torch.Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(hidden.device.type):
            return torch.get_autocast_dtype(hidden.device.type)
        return hidden.dtype

    def warn_materialized(self, shape: torch.Size) -> None:
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
            return _Placeholder(LazyLogits(self, hidden, pending_loss=self.pending_loss))
        # The job may call this module again.
        self._job = None
        return job(hidden)


class _Placeholder(dict[str, Any]):
    """Passes something through hooks that look for tensors in the output of a module, without showing them any.

    ZeRO-3 would otherwise gather the head's weights once more in backward.
    """

    def __init__(self, content: Any) -> None:
        super().__init__()
        self.content = content


def _unwrapped(module: nn.Module, args: Any, output: Any) -> Any:
    return output.content if isinstance(output, _Placeholder) else None
