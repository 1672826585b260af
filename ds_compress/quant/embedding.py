"""Embedding lookup with a fake-quantized table, of which only the rows that were looked up are quantized.

Rows that have their own scales need no other row. With one scale for the table, the scale is chosen from the whole
table, and still only the looked-up rows are quantized. Backward repeats that for the gradient's mask; saved are the
indices and the `Parameter` itself. See `fake_quantized_linear` for the gradient rule.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ds_compress.ops.counter_rng import uniform_at
from ds_compress.quant.arithmetic import clamp_to_dtype, dequantize_, working_dtype
from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.gradients import (
    finish_step_gradient,
    mix_gradient,
    normalized_blocks,
    step_terms,
    straight_through,
)
from ds_compress.quant.grid import Granularity
from ds_compress.quant.layout import GROUP_AXIS, join_scale, join_weight, split_weight
from ds_compress.quant.qparams import QParams
from ds_compress.quant.weights import (
    choose_weight_qparams,
    learned_qparams,
    own_global_scale,
    quantize_blocks,
)


def fake_quantized_embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    fake_quant: FakeQuantConfig,
    step_size: torch.Tensor | None = None,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> torch.Tensor:
    """`[..., dim]` in the weight's dtype for int32 or int64 `indices` `[...]` into `weight` `[rows, dim]`.

    The grid is per channel (a scale per row), per column group, or per tensor; `padding_idx` is not negative.
    Raises ValueError for groups of the flattened table and for square blocks, which cut across rows.
    """
    if fake_quant.grid.granularity in (Granularity.PER_GROUP, Granularity.PER_BLOCK):
        raise ValueError("an embedding is quantized per_channel (per row), per_column_group or per_tensor")
    padding = -1 if padding_idx is None else padding_idx
    return _FakeQuantizedEmbedding.apply(indices, weight, step_size, fake_quant, padding, scale_grad_by_freq)


class _FakeQuantizedEmbedding(Function):
    @staticmethod
    def forward(
        ctx: Any,
        indices: torch.Tensor,
        weight: torch.Tensor,
        step_size: torch.Tensor | None,
        fake_quant: FakeQuantConfig,
        padding_idx: int,
        scale_grad_by_freq: bool,
    ) -> torch.Tensor:
        ctx.fake_quant, ctx.padding_idx, ctx.scale_grad_by_freq = fake_quant, padding_idx, scale_grad_by_freq
        ctx.save_for_backward(indices, weight, step_size)
        rows, qparams, noise = _looked_up(indices, weight, fake_quant, step_size)
        blocks = quantize_blocks(rows, qparams, fake_quant.grid, noise)
        dequantized = [dequantize_(block, r) for block, r in zip(blocks, qparams, strict=True)]
        quantized = clamp_to_dtype(join_weight(dequantized, rows.shape, fake_quant.grid), weight.dtype)
        if fake_quant.blend_ratio:
            quantized.mul_(1 - fake_quant.blend_ratio).add_(rows, alpha=fake_quant.blend_ratio)
        return quantized.to(weight.dtype).view(*indices.shape, weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        indices, weight, step_size = ctx.saved_tensors
        fake_quant: FakeQuantConfig = ctx.fake_quant
        grad_rows = grad.reshape(-1, weight.shape[1])
        grad_step = None
        if fake_quant.changes_gradient:
            grad_rows, grad_step = _rows_backward(
                grad_rows, indices, weight, fake_quant, step_size, ctx.padding_idx
            )
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.ops.aten.embedding_dense_backward(
                grad_rows, indices.reshape(-1), weight.shape[0], ctx.padding_idx, ctx.scale_grad_by_freq
            )
        return None, grad_weight, grad_step if ctx.needs_input_grad[2] else None, None, None, None


def _looked_up(
    indices: torch.Tensor, weight: torch.Tensor, fake_quant: FakeQuantConfig, step_size: torch.Tensor | None
) -> tuple[torch.Tensor, list[QParams], torch.Tensor | None]:
    """The rows `[N, dim]` of all indices in the working dtype, their QParams, their rounding noise."""
    flat, grid = indices.reshape(-1), fake_quant.grid
    shared = (
        fake_quant.global_scale if fake_quant.global_scale is not None else own_global_scale(weight, grid)
    )
    rows = F.embedding(flat, weight).to(working_dtype(weight))
    noise = None
    if grid.stochastic:
        columns = torch.arange(weight.shape[1], device=weight.device)
        elements = flat.to(torch.int64)[:, None] * weight.shape[1] + columns
        noise = uniform_at(elements, fake_quant.noise_key).to(rows.dtype)
    if step_size is not None:
        scale = step_size.to(rows.dtype) * fake_quant.step_ratio
        of_rows = scale if grid.granularity is Granularity.PER_TENSOR else scale[flat]
        return rows, learned_qparams(of_rows, rows.shape, grid, shared), noise
    if grid.granularity is Granularity.PER_TENSOR:
        return rows, choose_weight_qparams(weight, grid, shared), noise
    return rows, choose_weight_qparams(rows, grid, shared), noise


def _rows_backward(
    grad_rows: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    fake_quant: FakeQuantConfig,
    step_size: torch.Tensor | None,
    padding_idx: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    grid = fake_quant.grid
    rows, qparams, noise = _looked_up(indices, weight, fake_quant, step_size)
    normalized = normalized_blocks(rows, fake_quant, qparams, noise)
    exact_grad = grad_rows.to(rows.dtype).contiguous()
    grads = split_weight(exact_grad, grid)
    masked = [straight_through(g, v, grid, grid.stochastic) for g, v in zip(grads, normalized, strict=True)]
    grad_step = None
    if step_size is not None:
        flat = indices.reshape(-1)
        trained = exact_grad * (flat != padding_idx)[:, None]  # a padding row trains neither weight nor scale
        grad_step = _step_gradient(
            split_weight(trained, grid), normalized, flat, weight, fake_quant, step_size
        )
    mixed = mix_gradient(join_weight(masked, rows.shape, grid), exact_grad, fake_quant)
    return mixed.to(grad_rows.dtype), grad_step


def _step_gradient(
    grads: list[torch.Tensor],
    normalized: list[torch.Tensor],
    flat: torch.Tensor,
    weight: torch.Tensor,
    fake_quant: FakeQuantConfig,
    step_size: torch.Tensor,
) -> torch.Tensor:
    """The sum of what each looked-up row adds to the gradient of the table's scales."""
    grid = fake_quant.grid
    one_scale = grid.granularity is Granularity.PER_TENSOR
    counts = [weight.numel() if one_scale else block.shape[GROUP_AXIS] for block in grads]
    terms = [step_terms(g, v, grid, n) for g, v, n in zip(grads, normalized, counts, strict=True)]
    sums = join_scale(
        [term.sum(GROUP_AXIS, keepdim=True) for term in terms], (flat.numel(), weight.shape[1]), grid
    )
    if one_scale:
        return finish_step_gradient(sums, step_size, fake_quant)
    per_scale = torch.zeros(step_size.shape, dtype=sums.dtype, device=sums.device)
    return finish_step_gradient(per_scale.index_add(0, flat, sums), step_size, fake_quant)
