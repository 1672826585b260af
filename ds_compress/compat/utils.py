"""The autograd functions of the removed library: `apply` computes its formulas, on the grids of `quant`.

Forward values equal the old ones wherever those were finite, computed in fp32 whatever the dtype of the input. Where
they were not, the rules of `quant.grid` hold: a group of zeros stays zero, a constant group stays that constant.
Gradients are straight through, also where a value clips, as they always were here (the layers of this library give
clipped values none).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from ds_compress.config.targets import exact_ceil
from ds_compress.quant.arithmetic import dequantize_, quantize_block, working_dtype
from ds_compress.quant.grid import Grid, WeightGrid
from ds_compress.quant.qparams import choose_qparams, qparams_from_range


class TopKBinarizer(Function):
    """1 for the ceil(threshold * n) largest inputs, 0 for the others; the gradient goes to the inputs as it is.

    `apply(inputs, threshold, sigmoid)`: with `sigmoid`, the kept share is sigmoid(threshold) and `threshold` a
    tensor of one element, whose gradient is the sum of the kept inputs' gradients. Ties go to the first ones.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, threshold: Any, sigmoid: bool) -> torch.Tensor:
        share = float(torch.sigmoid(threshold)) if sigmoid else float(threshold)
        keep = exact_ceil(share, inputs.numel())
        order = inputs.detach().flatten().sort(descending=True, stable=True).indices
        mask = torch.zeros_like(inputs, memory_format=torch.contiguous_format)
        mask.view(-1)[order[:keep]] = 1
        ctx.sigmoid, ctx.shape = sigmoid, getattr(threshold, "shape", None)
        ctx.save_for_backward(mask if sigmoid else None)
        return mask

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        of_threshold = (grad * mask).sum().view(ctx.shape) if ctx.sigmoid else None
        return grad.clone(), of_threshold, None


class _Quantizer(Function):
    """`apply(input, num_bits, min_value=None, max_value=None, num_groups=1)` in the shape and dtype of the input.

    `num_groups`: parts of the flattened input that have a scale each. `min_value`, `max_value`: both or neither; a
    fixed range for the whole input. Raises ValueError for a range beside groups, or groups that do not divide it.
    """

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad.clone(), None, None, None, None


class SymQuantizer(_Quantizer):
    """scale = 2 max|x| / 2^b, codes from -2^(b-1) to 2^(b-1) - 1; with a fixed range max|x| is max(|min|, max)."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        num_bits: int,
        min_value: torch.Tensor | None = None,
        max_value: torch.Tensor | None = None,
        num_groups: int = 1,
    ) -> torch.Tensor:
        return _uniform(input, Grid(num_bits), min_value, max_value, num_groups)


class AsymQuantizer(_Quantizer):
    """scale = (max - min) / 2^b, zero = round(min / scale) scale, codes from 0 to 2^b - 1."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        num_bits: int,
        min_value: torch.Tensor | None = None,
        max_value: torch.Tensor | None = None,
        num_groups: int = 1,
    ) -> torch.Tensor:
        return _uniform(input, Grid(num_bits, symmetric=False), min_value, max_value, num_groups)


class TernaryQuantizer(_Quantizer):
    """alpha sign(x) where |x| > 0.7 mean|x|, else 0; alpha is the mean of those |x|. `num_bits` has no effect."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        num_bits: int,
        min_value: torch.Tensor | None = None,
        max_value: torch.Tensor | None = None,
        num_groups: int = 1,
    ) -> torch.Tensor:
        return _signs(input, WeightGrid(2), min_value, max_value, num_groups)


class BinaryQuantizer(_Quantizer):
    """sign(x) mean|x|. `num_bits` has no effect."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        num_bits: int,
        min_value: torch.Tensor | None = None,
        max_value: torch.Tensor | None = None,
        num_groups: int = 1,
    ) -> torch.Tensor:
        return _signs(input, WeightGrid(1), min_value, max_value, num_groups)


def _uniform(
    x: torch.Tensor, grid: Grid, low: torch.Tensor | None, high: torch.Tensor | None, groups: int
) -> torch.Tensor:
    if (low is None) != (high is None) or (low is not None and groups != 1):
        raise ValueError("give both min_value and max_value, and then no num_groups, or neither of the two")
    if low is None or high is None:
        return _in_groups(x, grid, groups)
    exact = working_dtype(x)
    lowest, highest = (value.detach().to(exact).reshape(()) for value in (low, high))
    qparams = qparams_from_range(lowest, highest, grid)
    return dequantize_(quantize_block(x.detach().to(exact), qparams, grid), qparams).to(x.dtype)


def _signs(
    x: torch.Tensor, grid: Grid, low: torch.Tensor | None, high: torch.Tensor | None, groups: int
) -> torch.Tensor:
    if low is not None or high is not None:
        raise ValueError("ternary and binary quantizers measure their scale: give no range")
    return _in_groups(x, grid, groups)


def _in_groups(x: torch.Tensor, grid: Grid, groups: int) -> torch.Tensor:
    if x.numel() % groups:
        raise ValueError(f"{groups} groups do not divide {x.numel()} values")
    values = x.detach().to(working_dtype(x)).reshape(groups, -1)
    qparams = choose_qparams(values, (1,), grid)
    return dequantize_(quantize_block(values, qparams, grid), qparams).reshape(x.shape).to(x.dtype)
