"""Products with fake-quantized operands, whose backward quantizes again instead of keeping copies.

Saved for backward are the input and the `Parameter` themselves, as an unquantized layer saves them, and the
scales where they are less than one for `WEIGHTS_PER_KEPT_SCALE` numbers: under ZeRO-3 the weight is released
between forward and backward, and a quantized copy of it that survived would bring back the memory that
sharding saved. The recomputation is elementwise, small beside the products.

Gradients are straight through: as if the quantizer were the identity, but zero where a value lies beyond the
outermost code (torch's rule: kept where low <= round(x / scale) <= high). Ternary and binary weights have no
such values. With a recipe that says `integer`, forward multiplies the codes themselves (`integer_product`); backward
is the same. Under autocast the quantizer reads the operands in their own precision and computes in fp32; the
product runs in the autocast dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ds_compress.ops import bitmask
from ds_compress.quant.fused import FakeQuantized
from ds_compress.quant.gradients import straight_through, weight_backward
from ds_compress.quant.grid import ActivationGrid, Ranges, normalize, working_dtype
from ds_compress.quant.integer_product import integer_product, multiplies_codes
from ds_compress.quant.operands import FakeQuantConfig, quantize_input, quantize_weight, recipe_ranges
from ds_compress.quant.products import Product

WEIGHTS_PER_KEPT_SCALE = 128
_FIELDS = 3  # of Ranges


def quantized_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    product: Product,
    fake_quant_of: FakeQuantConfig | None = None,
    input_grid: ActivationGrid | None = None,
    step_size: torch.Tensor | None = None,
    input_range: torch.Tensor | None = None,
) -> torch.Tensor:
    """`product.forward(Q(x), Q(weight), bias)` in the dtype that the unquantized product would have.

    `step_size`: learned scales of `layout.scale_shape` when the recipe's grid is learned;
    `input_range`: the two numbers (min, max) of a static input grid. An operand without recipe or grid is
    used as it is.
    """
    return _QuantizedProduct.apply(
        x, weight, bias, step_size, input_range, product, fake_quant_of, input_grid
    )


class _QuantizedProduct(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        step_size: torch.Tensor | None,
        input_range: torch.Tensor | None,
        product: Product,
        fake_quant: FakeQuantConfig | None,
        input_grid: ActivationGrid | None,
    ) -> torch.Tensor:
        ctx.product, ctx.fake_quant, ctx.input_grid = product, fake_quant, input_grid
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        needs_x, needs_weight, _, needs_step = ctx.needs_input_grad[:4]
        input_clips = input_grid is not None and input_grid.may_clip
        y, x_ranges, weight_ranges = _forward(
            x, weight, bias, step_size, input_range, product, fake_quant, input_grid
        )
        ctx.save_for_backward(
            x if needs_weight or needs_step or (needs_x and input_clips) else None,
            weight if needs_x or needs_weight or needs_step else None,
            step_size,
            *(keep_ranges(x_ranges, x) if x_ranges else [None] * _FIELDS),
            *keep_ranges(weight_ranges, weight),
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, step_size, *kept = ctx.saved_tensors
        product, fake_quant, input_grid = ctx.product, ctx.fake_quant, ctx.input_grid
        needs_x, needs_weight, needs_bias, needs_step = ctx.needs_input_grad[:4]
        x_ranges, weight_ranges = kept_ranges(kept[:_FIELDS]), kept_ranges(kept[_FIELDS:])
        if fake_quant is not None and weight is not None and not weight_ranges:
            weight_ranges = recipe_ranges(weight, fake_quant, step_size)
        grad_x = grad_weight = grad_step = kept_weights = None
        if needs_x:
            operand = weight
            if fake_quant is not None:
                masks = needs_weight and fake_quant.changes_gradient and not fake_quant.grid.learned
                quantized = quantize_weight(weight, fake_quant, step_size, weight_ranges, keep=masks)
                operand, kept_weights = quantized.values, quantized.kept
            grad_x = product.input_gradient(grad, ctx.x_shape, operand.to(grad.dtype)).to(ctx.x_dtype)
            del operand
        if x is not None:
            operand = x
            if input_grid is not None:
                grad_x, operand = _input_backward(grad_x, x, input_grid, x_ranges)
            if needs_weight or needs_step:
                grad_weight = product.weight_gradient(grad, operand.to(grad.dtype), weight).to(weight.dtype)
            del operand
        if grad_weight is not None and fake_quant is not None:
            grad_weight, grad_step = weight_backward(
                grad_weight, weight, fake_quant, weight_ranges, step_size, kept_weights
            )
        return (
            grad_x,
            grad_weight if needs_weight else None,
            product.bias_gradient(grad) if needs_bias else None,
            grad_step if needs_step else None,
            *[None] * 4,
        )


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    step_size: torch.Tensor | None,
    input_range: torch.Tensor | None,
    product: Product,
    fake_quant: FakeQuantConfig | None,
    input_grid: ActivationGrid | None,
) -> tuple[torch.Tensor, list[Ranges], list[Ranges]]:
    """The product, the input's ranges (empty where it would be work to know them) and the weight's."""
    dtype = _autocast_dtype(x)
    if fake_quant is not None and input_grid is not None and multiplies_codes(fake_quant, x):
        return integer_product(
            x, weight, bias, fake_quant, input_grid, step_size, input_range, dtype or x.dtype
        )
    x_ranges: list[Ranges] = []
    weight_ranges: list[Ranges] = []
    if input_grid is not None:
        operand = quantize_input(x, input_grid, input_range)
        x, x_ranges = operand.values, operand.ranges
    if fake_quant is not None:
        operand = quantize_weight(weight, fake_quant, step_size)
        weight, weight_ranges = operand.values, operand.ranges
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return product.forward(x, weight, bias), x_ranges, weight_ranges


def keep_ranges(ranges: list[Ranges], of: torch.Tensor) -> list[torch.Tensor | None]:
    """The tensors of `ranges` for `save_for_backward`; as many None where they are not small beside `of`."""
    count = sum(r.scale.numel() for r in ranges)
    if count > max(1, of.numel() // WEIGHTS_PER_KEPT_SCALE):
        return [None] * (_FIELDS * len(ranges))
    return [tensor for r in ranges for tensor in (r.scale, r.offset, r.threshold)]


def kept_ranges(saved: Sequence[torch.Tensor | None]) -> list[Ranges]:
    """The inverse of `keep_ranges`; empty when nothing was kept."""
    ranges = []
    for i in range(0, len(saved), _FIELDS):
        scale = saved[i]
        if scale is None:
            return []
        ranges.append(Ranges(scale, saved[i + 1], saved[i + 2]))
    return ranges


def _input_backward(
    grad_x: torch.Tensor | None, x: torch.Tensor, grid: ActivationGrid, ranges: list[Ranges]
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The input's gradient with clipped values zeroed, and Q(x)."""
    masks = grad_x is not None and grid.may_clip
    quantized = quantize_input(x, grid, ranges=ranges[0] if ranges else None, keep=masks)
    if grad_x is not None and masks:
        grad_x = _without_clipped(grad_x, x, grid, quantized)
    return grad_x, quantized.values


def _without_clipped(
    grad: torch.Tensor, x: torch.Tensor, grid: ActivationGrid, quantized: FakeQuantized
) -> torch.Tensor:
    if quantized.kept is None:
        return straight_through(grad, normalize(x.to(working_dtype(x)), quantized.ranges[0]), grid)
    grad = grad.contiguous()
    bitmask.apply_(grad.view(-1), quantized.kept)
    return grad


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
