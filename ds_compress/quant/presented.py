"""What experts compute with while their forward runs: fake-quantized stacks, of which backward keeps no copy.

Autograd would keep views of a stack for the gradients of the inputs, one for each expert or one of all. Hooks recognize
them by their storage and keep the parameter itself and the place of the view; what they stand for is quantized again in
backward, once for each stack. Hooks that were there before (gradient checkpointing has some) get everything else, and
the parameter in place of the view.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ds_compress.imports import not_compiled
from ds_compress.quant.fake_quant import FakeQuantConfig, fake_quantize_weight
from ds_compress.quant.fused import FakeQuantized
from ds_compress.quant.gradients import weight_backward
from ds_compress.quant.grid import Granularity, Levels

_Hook = Callable[[Any], Any]
_STACK_OF_MATRICES = 3


@dataclass(eq=False)
class Stack:
    """How one parameter is presented in one forward, and what backward has made of it so far.

    dtype: of what is presented. views: those that autograd keeps. made: all that quantizing again gave, until the last
    view was handed out; `found`: the same without the values, for the gradient of the parameter.
    """

    parameter: torch.Tensor
    step_size: torch.Tensor | None
    fake_quant: FakeQuantConfig
    dtype: torch.dtype
    views: int = 0
    handed_out: int = 0
    made: torch.Tensor | None = None
    found: FakeQuantized | None = field(default=None, repr=False)

    @property
    def needs_unclipped(self) -> bool:
        return self.fake_quant.changes_gradient and not self.fake_quant.grid.learned

    @property
    def by_outputs(self) -> bool:
        """Whether stacks of [inputs, outputs] are turned, so that what shares a scale lies together in memory."""
        grid = self.fake_quant.grid
        in_rows = grid.granularity in (Granularity.PER_CHANNEL, Granularity.PER_COLUMN_GROUP)
        # The noise of a weight depends on its place, and a mean on the order of its terms.
        has_order = grid.stochastic or grid.levels in (Levels.TERNARY, Levels.BINARY)
        return grid.channel_axis == 1 and in_rows and not has_order

    def turned(self, tensor: torch.Tensor) -> torch.Tensor:
        """[experts, outputs, inputs] of a parameter, its gradient or its scales, where these are worked on."""
        if not self.by_outputs or tensor.dim() < _STACK_OF_MATRICES:
            return tensor
        return _transposed(tensor)

    @property
    def config(self) -> FakeQuantConfig:
        """That of what `turned` gives."""
        if not self.by_outputs:
            return self.fake_quant
        return replace(self.fake_quant, grid=replace(self.fake_quant.grid, channel_axis=0))

    def quantized(
        self, parameter: torch.Tensor, step_size: torch.Tensor | None, again: bool
    ) -> FakeQuantized:
        """Of what `turned` gives of both."""
        scales = None if step_size is None else self.turned(step_size)
        with_unclipped = again and self.needs_unclipped
        return fake_quantize_weight(
            self.turned(parameter.detach()), self.config, scales, with_unclipped=with_unclipped
        )

    def again(self, parameter: torch.Tensor, step_size: torch.Tensor | None) -> torch.Tensor:
        """What was presented, in backward; the last of the views lets go of it."""
        if self.made is None:
            found = self.quantized(parameter, step_size, again=True)
            self.made = found.values.to(self.dtype)
            self.found = FakeQuantized(found.values[:0], found.qparams, found.unclipped)
        made = self.made
        self.handed_out += 1
        if self.handed_out >= self.views:
            self.made, self.handed_out = None, 0
        return made


class _Presented(Function):
    """Q(w) in forward; straight through, with the rules of `gradients.weight_backward`, in backward."""

    @staticmethod
    def forward(
        ctx: Any, parameter: torch.Tensor, step_size: torch.Tensor | None, stack: Stack
    ) -> torch.Tensor:
        ctx.stack = stack
        ctx.dtype = parameter.dtype
        saves = stack.fake_quant.changes_gradient or step_size is not None
        ctx.save_for_backward(*((parameter, step_size) if saves else (None, None)))
        values = stack.quantized(parameter, step_size, again=False).values.to(stack.dtype).contiguous()
        # As a view: a product takes either.
        return values.transpose(1, 2) if stack.by_outputs else values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parameter, step_size = ctx.saved_tensors
        stack: Stack = ctx.stack
        grad = grad.to(ctx.dtype)
        if parameter is None:
            return grad, None, None
        found = stack.found or stack.quantized(parameter, step_size, again=True)
        stack.found = None
        scales = None if step_size is None else stack.turned(step_size)
        grad, grad_step = weight_backward(
            stack.turned(grad), stack.turned(parameter), stack.config, found.qparams, scales, found.unclipped
        )
        if stack.by_outputs:
            grad = _transposed(grad)
            if grad_step is not None and grad_step.dim() == _STACK_OF_MATRICES:
                grad_step = _transposed(grad_step)
        return grad if ctx.needs_input_grad[0] else None, grad_step, None


@dataclass(frozen=True)
class _View:
    """Of a stack; `parameter` and `step_size` as the hooks that were there before keep them."""

    stack: Stack
    parameter: Any
    step_size: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _transposed(stack: torch.Tensor) -> torch.Tensor:
    """Each matrix of the stack, contiguous."""
    if stack.device.type != "cpu" or torch.compiler.is_compiling():
        return stack.transpose(
            1, 2
        ).contiguous()  # one operation, in a graph, too, however many experts there are
    # torch's CPU copy goes through memory in blocks for a matrix, and not for a stack of them.
    turned = stack.new_empty((stack.shape[0], stack.shape[2], stack.shape[1]))
    for matrix, source in zip(turned, stack, strict=True):
        matrix.copy_(source.t())
    return turned


def present(stack: Stack) -> torch.Tensor:
    """The stack that forward computes with."""
    values: torch.Tensor = _Presented.apply(stack.parameter, stack.step_size, stack)
    return values


@contextlib.contextmanager
def without_copies(presented: Mapping[Stack, torch.Tensor]) -> Iterator[None]:
    """Inside, autograd keeps no view of what is presented."""
    if torch.compiler.is_compiling():
        yield  # what is kept is then decided by the compiler
        return
    outer_pack, outer_unpack = _outer_hooks()
    by_storage = {values.untyped_storage().data_ptr(): stack for stack, values in presented.items()}

    def pack(tensor: torch.Tensor) -> Any:
        stack = by_storage.get(_storage(tensor))
        if stack is None or tensor.dtype is not stack.dtype or not tensor.numel():
            return outer_pack(tensor)
        stack.views += 1
        step_size = None if stack.step_size is None else outer_pack(stack.step_size)
        size, stride, offset = tensor.size(), tensor.stride(), int(tensor.storage_offset())
        return _View(stack, outer_pack(stack.parameter), step_size, size, stride, offset)

    def unpack(kept: Any) -> Any:
        if not isinstance(kept, _View):
            return outer_unpack(kept)
        if torch.is_grad_enabled():
            raise RuntimeError("experts whose weights are quantized have no second derivatives")
        parameter = outer_unpack(kept.parameter)
        step_size = None if kept.step_size is None else outer_unpack(kept.step_size)
        return kept.stack.again(parameter, step_size).as_strided(kept.size, kept.stride, kept.offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
        return 0


@not_compiled
def _outer_hooks() -> tuple[_Hook, _Hook]:
    ask: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    found = None if ask is None else ask(False)
    return found or (_as_it_is, _as_it_is)


def _as_it_is(value: Any) -> Any:
    return value
