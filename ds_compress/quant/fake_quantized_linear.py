"""Linear ops on fake-quantized inputs and weights, whose backward quantizes again instead of saving copies.

Saved for backward are the input and the `Parameter` themselves, as an unquantized layer saves them, and the
scales where they are fewer than one for `WEIGHTS_PER_SAVED_SCALE` numbers: under ZeRO-3 the weight is released
between forward and backward, and a saved quantized copy would bring back the memory that sharding saved. The
recomputation is elementwise, and cheap beside the matrix products.

Gradients are straight through: as if the quantizer were the identity, but zero where a value clips (torch's rule:
passed on where quant_min <= round(x / scale) <= quant_max). Ternary and binary weights never clip. With a
`FakeQuantConfig.kernel` of "int8" or "fp8", forward multiplies the codes themselves (`integer_linear`, `fp8_linear`);
backward is the same, unless `FakeQuantConfig.backward` is "int8". Under autocast the quantizer reads input and weight
in their own precision and computes in fp32; the linear op runs in the autocast dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ds_compress.ops import bitmask
from ds_compress.quant.arithmetic import normalize, working_dtype
from ds_compress.quant.fake_quant import (
    FakeQuantConfig,
    autocast_dtype,
    fake_quantize_input,
    fake_quantize_weight,
    in_groups,
    weight_qparams,
)
from ds_compress.quant.fp8_linear import fp8_linear, runs_on_fp8
from ds_compress.quant.fused import FakeQuantized
from ds_compress.quant.gradients import straight_through, weight_backward
from ds_compress.quant.grid import ActivationGrid
from ds_compress.quant.integer_linear import (
    input_gradient,
    integer_linear,
    multiplies_gradients,
    runs_on_integers,
)
from ds_compress.quant.linear_ops import LinearOp
from ds_compress.quant.qparams import QParams

WEIGHTS_PER_SAVED_SCALE = 128
_FIELDS = 3  # of QParams


def fake_quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    linear_op: LinearOp,
    fake_quant: FakeQuantConfig | None = None,
    input_grid: ActivationGrid | None = None,
    step_size: torch.Tensor | None = None,
    input_range: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_op.forward(Q(x), Q(weight), bias)` in the dtype that the unquantized op would have.

    Args:
        fake_quant: how the weight is quantized; None: it is used as it is.
        input_grid: how the input is quantized; None: it is used as it is.
        step_size: learned scales of `layout.scale_shape`, when the weight's grid is learned.
        input_range: the two numbers (min, max) of a static input grid.
    """
    return _FakeQuantizedLinear.apply(
        x, weight, bias, step_size, input_range, linear_op, fake_quant, input_grid
    )


class _FakeQuantizedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        step_size: torch.Tensor | None,
        input_range: torch.Tensor | None,
        linear_op: LinearOp,
        fake_quant: FakeQuantConfig | None,
        input_grid: ActivationGrid | None,
    ) -> torch.Tensor:
        ctx.linear_op, ctx.fake_quant, ctx.input_grid = linear_op, fake_quant, input_grid
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        needs_x, needs_weight, _, needs_step = ctx.needs_input_grad[:4]
        input_clips = input_grid is not None and input_grid.may_clip
        y, x_qparams, w_qparams = _forward(
            x, weight, bias, step_size, input_range, linear_op, fake_quant, input_grid
        )
        ctx.save_for_backward(
            x if needs_weight or needs_step or (needs_x and input_clips) else None,
            weight if needs_x or needs_weight or needs_step else None,
            step_size,
            input_range if input_grid is not None and input_grid.has_global_scale else None,
            *(saved_qparams(x_qparams, x) if x_qparams else [None] * _FIELDS),
            *saved_qparams(w_qparams, weight),
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, step_size, input_range, *saved = ctx.saved_tensors
        linear_op, fake_quant, input_grid = ctx.linear_op, ctx.fake_quant, ctx.input_grid
        needs_x, needs_weight, needs_bias, needs_step = ctx.needs_input_grad[:4]
        x_qparams, w_qparams = restored_qparams(saved[:_FIELDS]), restored_qparams(saved[_FIELDS:])
        if fake_quant is not None and weight is not None and not w_qparams:
            w_qparams = weight_qparams(weight, fake_quant, step_size)
        grad_x = grad_weight = grad_step = unclipped = None
        on_integers = fake_quant is not None and input_grid is not None
        if needs_x and on_integers and multiplies_gradients(fake_quant, grad):
            grad_x = input_gradient(grad, weight, fake_quant, w_qparams).to(ctx.x_dtype)
        elif needs_x:
            used_weight = weight
            if fake_quant is not None:
                masks = needs_weight and fake_quant.changes_gradient and not fake_quant.grid.learned
                quantized = fake_quantize_weight(
                    weight, fake_quant, step_size, w_qparams, with_unclipped=masks
                )
                used_weight, unclipped = quantized.values, quantized.unclipped
            grad_x = linear_op.input_gradient(grad, ctx.x_shape, used_weight.to(grad.dtype)).to(ctx.x_dtype)
            del used_weight
        if x is not None:
            used_x = x
            if input_grid is not None:
                grad_x, used_x = _input_backward(grad_x, x, input_grid, x_qparams, input_range)
            if needs_weight or needs_step:
                grad_weight = linear_op.weight_gradient(grad, used_x.to(grad.dtype), weight).to(weight.dtype)
            del used_x
        if grad_weight is not None and fake_quant is not None:
            grad_weight, grad_step = weight_backward(
                grad_weight, weight, fake_quant, w_qparams, step_size, unclipped
            )
        return (
            grad_x,
            grad_weight if needs_weight else None,
            linear_op.bias_gradient(grad) if needs_bias else None,
            grad_step if needs_step else None,
            *[None] * 4,
        )


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    step_size: torch.Tensor | None,
    input_range: torch.Tensor | None,
    linear_op: LinearOp,
    fake_quant: FakeQuantConfig | None,
    input_grid: ActivationGrid | None,
) -> tuple[torch.Tensor, list[QParams], list[QParams]]:
    """The result, the QParams of the input (empty where finding them would cost another pass) and of the weight."""
    dtype = autocast_dtype(x)
    if fake_quant is not None and input_grid is not None and runs_on_integers(fake_quant, x):
        return integer_linear(
            x, weight, bias, fake_quant, input_grid, step_size, input_range, dtype or x.dtype
        )
    if fake_quant is not None and input_grid is not None and runs_on_fp8(fake_quant, input_grid, x):
        return fp8_linear(x, weight, bias, fake_quant, input_grid, step_size, input_range, dtype or x.dtype)
    x_qparams: list[QParams] = []
    w_qparams: list[QParams] = []
    if input_grid is not None:
        quantized = fake_quantize_input(x, input_grid, input_range)
        x, x_qparams = quantized.values, quantized.qparams
    if fake_quant is not None:
        quantized = fake_quantize_weight(weight, fake_quant, step_size)
        weight, w_qparams = quantized.values, quantized.qparams
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return linear_op.forward(x, weight, bias), x_qparams, w_qparams


def saved_qparams(qparams: list[QParams], of: torch.Tensor) -> list[torch.Tensor | None]:
    """The tensors of `qparams` for `save_for_backward`; as many None where they are not small beside `of`."""
    count = sum(q.scale.numel() for q in qparams)
    if count > max(1, of.numel() // WEIGHTS_PER_SAVED_SCALE):
        return [None] * (_FIELDS * len(qparams))
    return [tensor for q in qparams for tensor in (q.scale, q.offset, q.threshold)]


def restored_qparams(saved: Sequence[torch.Tensor | None]) -> list[QParams]:
    """The inverse of `saved_qparams`; empty when nothing was saved."""
    qparams = []
    for i in range(0, len(saved), _FIELDS):
        scale = saved[i]
        if scale is None:
            return []
        qparams.append(QParams(scale, saved[i + 1], saved[i + 2]))
    return qparams


def _input_backward(
    grad_x: torch.Tensor | None,
    x: torch.Tensor,
    grid: ActivationGrid,
    qparams: list[QParams],
    fixed_range: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The input's gradient with clipped values zeroed, and Q(x)."""
    masks = grad_x is not None and grid.may_clip
    quantized = fake_quantize_input(
        x, grid, fixed_range, qparams[0] if qparams else None, with_unclipped=masks
    )
    if grad_x is not None and masks:
        grad_x = _without_clipped(grad_x, x, grid, quantized)
    return grad_x, quantized.values


def _without_clipped(
    grad: torch.Tensor, x: torch.Tensor, grid: ActivationGrid, quantized: FakeQuantized
) -> torch.Tensor:
    if quantized.unclipped is None:
        normalized = normalize(in_groups(x.to(working_dtype(x)), grid), quantized.qparams[0])
        return straight_through(grad, normalized.view(x.shape), grid)
    grad = grad.contiguous()
    bitmask.apply_(grad.view(-1), quantized.unclipped)
    return grad
