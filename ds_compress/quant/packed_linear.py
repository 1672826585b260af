"""A linear op by a weight that is kept as codes: dequantized for forward, and again for backward, never kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ds_compress.quant.fake_quantized_tensor import fake_quantized_tensor
from ds_compress.quant.grid import ActivationGrid
from ds_compress.quant.linear_ops import LinearOp
from ds_compress.quant.packed_weight import PackedWeight, packed_weight_of


def packed_linear(
    x: torch.Tensor,
    layer: nn.Module,
    bias: torch.Tensor | None,
    linear_op: LinearOp,
    input_grid: ActivationGrid | None = None,
    input_range: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_op.forward(Q(x), W, bias)` with the packed weight of `layer`, in the dtype that the plain op would have.

    The gradient reaches x (zero where an input clips) and the bias.
    """
    if input_grid is not None:
        x = fake_quantized_tensor(x, input_grid, input_range)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    y: torch.Tensor = _PackedLinear.apply(
        x.to(dtype), None if bias is None else bias.to(dtype), layer, linear_op
    )
    return y


class _PackedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: nn.Module, linear_op: LinearOp
    ) -> torch.Tensor:
        ctx.layer, ctx.linear_op, ctx.shape = layer, linear_op, x.shape
        return linear_op.forward(x, _held(layer).dequantized(layer).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = _held(ctx.layer).dequantized(ctx.layer).to(grad.dtype)
            grad_x = ctx.linear_op.input_gradient(grad, ctx.shape, weight)
        if ctx.needs_input_grad[1]:
            grad_bias = ctx.linear_op.bias_gradient(grad)
        return grad_x, grad_bias, None, None


def _held(layer: nn.Module) -> PackedWeight:
    held = packed_weight_of(layer)
    if held is None:
        raise RuntimeError("the layer has no packed weight any more: backward ran after it was unpacked")
    return held
