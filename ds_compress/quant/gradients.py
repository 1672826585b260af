"""What a quantizer does to gradients: straight through, zero beyond the grid, and the learned step size."""

from __future__ import annotations

import math

import torch

from ds_compress.ops import bitmask
from ds_compress.quant.arithmetic import normalize, round_and_clamp_, unclipped_interval, working_dtype
from ds_compress.quant.fake_quant import FakeQuantConfig, rounding_noise
from ds_compress.quant.grid import Grid, WeightGrid
from ds_compress.quant.layout import GROUP_AXIS, join_scale, join_weight, split_weight
from ds_compress.quant.qparams import QParams


def straight_through(
    grad: torch.Tensor, normalized: torch.Tensor, grid: Grid, stochastic: bool = False
) -> torch.Tensor:
    """`grad` where `normalized` is rounded to the grid without clipping, else 0; in grad's dtype."""
    low, high = unclipped_interval(grid, normalized.dtype, stochastic)
    # hardtanh's derivative is this mask in one vectorised pass; masked_fill costs twenty times as much.
    masked = torch.ops.aten.hardtanh_backward(grad.to(normalized.dtype), normalized, low, high)
    return masked.to(grad.dtype)


def weight_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    fake_quant: FakeQuantConfig,
    qparams: list[QParams],
    step_size: torch.Tensor | None = None,
    unclipped: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of the weight and of its learned step size from the quantized weight's gradient.

    unclipped: packed bits of the weights that did not clip, where an earlier pass has computed them.
    """
    grid = fake_quant.grid
    if not fake_quant.changes_gradient:
        return grad, None
    if unclipped is not None and not fake_quant.blend_ratio:
        grad = grad.contiguous()
        bitmask.apply_(grad.view(-1), unclipped)
        return grad, None
    exact_grad = grad.to(working_dtype(weight)).contiguous()
    grads = split_weight(exact_grad, grid)
    normalized = normalized_blocks(weight, fake_quant, qparams, rounding_noise(weight, fake_quant))
    masked = [straight_through(g, v, grid, grid.stochastic) for g, v in zip(grads, normalized, strict=True)]
    grad_step = None
    if step_size is not None:
        sums = [
            step_terms(g, v, grid, v.shape[GROUP_AXIS]).sum(GROUP_AXIS, keepdim=True)
            for g, v in zip(grads, normalized, strict=True)
        ]
        grad_step = finish_step_gradient(join_scale(sums, weight.shape, grid), step_size, fake_quant)
    mixed = mix_gradient(join_weight(masked, weight.shape, grid), exact_grad, fake_quant)
    return mixed.to(grad.dtype), grad_step


def normalized_blocks(
    weight: torch.Tensor, fake_quant: FakeQuantConfig, qparams: list[QParams], noise: torch.Tensor | None
) -> list[torch.Tensor]:
    """The quantized values before rounding of each block of `layout.split_weight`; of integers that are rounded
    stochastically, those that are floored."""
    blocks = split_weight(weight.to(working_dtype(weight)).contiguous(), fake_quant.grid)
    normalized = [normalize(block, q) for block, q in zip(blocks, qparams, strict=True)]
    if noise is not None and fake_quant.grid.format == "int":
        for block, noise_block in zip(normalized, split_weight(noise, fake_quant.grid), strict=True):
            block.add_(noise_block)
    return normalized


def mix_gradient(masked: torch.Tensor, grad: torch.Tensor, fake_quant: FakeQuantConfig) -> torch.Tensor:
    """The unquantized part of a blended weight passes the full gradient; overwrites `masked`."""
    if not fake_quant.blend_ratio:
        return masked
    return masked.mul_(1 - fake_quant.blend_ratio).add_(grad, alpha=fake_quant.blend_ratio)


def step_terms(grad: torch.Tensor, normalized: torch.Tensor, grid: WeightGrid, count: int) -> torch.Tensor:
    """What each weight adds to its scale's gradient (Esser et al. 2020, "Learned step size quantization",
    eq. 3), with its gradient scale 1 / sqrt(count * quant_max), `count` the weights that share one scale."""
    quantized = round_and_clamp_(normalized.clone(), grid)
    low, high = unclipped_interval(grid, normalized.dtype)
    inside = torch.ops.aten.hardtanh_backward(normalized, normalized, low, high)
    return quantized.sub_(inside).mul_(grad).mul_(1 / math.sqrt(count * grid.quant_max))


def finish_step_gradient(
    per_scale: torch.Tensor, step_size: torch.Tensor, fake_quant: FakeQuantConfig
) -> torch.Tensor:
    """From the gradient of the scale |step_size| * step_ratio to that of the parameter."""
    sign = torch.where(step_size < 0, -1.0, 1.0)
    return (per_scale * (fake_quant.step_ratio * (1 - fake_quant.blend_ratio)) * sign).to(step_size.dtype)
