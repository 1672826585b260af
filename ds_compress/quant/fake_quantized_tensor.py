"""Fake quantization of a tensor that no layer multiplies, such as the keys of an attention: straight through."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ds_compress.ops import bitmask
from ds_compress.quant.fake_quant import fake_quantize_input
from ds_compress.quant.grid import ActivationGrid


def fake_quantized_tensor(
    x: torch.Tensor, grid: ActivationGrid, fixed_range: torch.Tensor | None = None
) -> torch.Tensor:
    """Q(x) in the dtype and shape of x (fp32, bf16 or fp16); its gradient passes where no value clips.

    Args:
        fixed_range: the two numbers (min, max) of a static grid.
    """
    values: torch.Tensor = _FakeQuantizedTensor.apply(x, grid, fixed_range)
    return values


class _FakeQuantizedTensor(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, grid: ActivationGrid, fixed_range: torch.Tensor | None
    ) -> torch.Tensor:
        masks = ctx.needs_input_grad[0] and grid.may_clip
        quantized = fake_quantize_input(x, grid, fixed_range, with_unclipped=masks)
        ctx.save_for_backward(quantized.unclipped if masks else None)
        return quantized.values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (unclipped,) = ctx.saved_tensors
        if unclipped is not None:
            grad = grad.clone(memory_format=torch.contiguous_format)
            bitmask.apply_(grad.view(-1), unclipped)
        return grad, None, None
