"""A linear op on FP8 codes as the forward of a QAT layer: training multiplies the numbers that a server will.

y[m, n] = (sum over k of q_x[m, k] * q_w[n, k]) * scale_x[m] * scale_w[n] + bias[n], by `torch._scaled_mm`, whose sums
are fp32. The float path multiplies the same numbers after scaling them, so both differ by rounding only. Backward is
that of the float path: straight through, in the training dtype.
"""

from __future__ import annotations

import torch

from ds_compress.quant.arithmetic import quantize_block
from ds_compress.quant.fake_quant import FakeQuantConfig, input_qparams, rounding_noise, weight_qparams
from ds_compress.quant.grid import ActivationGrid
from ds_compress.quant.layout import join_scale, join_weight
from ds_compress.quant.qparams import QParams
from ds_compress.quant.weights import quantize_blocks

CODES = torch.float8_e4m3fn
FIRST_CAPABILITY = (8, 9)
"""Of CUDA devices with FP8 tensor cores."""
MULTIPLE = 16
"""Inputs and outputs of a layer that `torch._scaled_mm` takes are multiples of it."""


def runs_on_fp8(fake_quant: FakeQuantConfig, grid: ActivationGrid, x: torch.Tensor) -> bool:
    """Whether a forward that quantizes input and weight multiplies codes; not before both are in FP8."""
    return (
        fake_quant.kernel == "fp8"
        and fake_quant.grid.format == grid.format == "fp8_e4m3"
        and not fake_quant.blend_ratio
        and x.dtype is not torch.float64
    )


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    fake_quant: FakeQuantConfig,
    input_grid: ActivationGrid,
    step_size: torch.Tensor | None,
    fixed_range: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, list[QParams], list[QParams]]:
    """y `[..., out]` in `out_dtype`, the QParams of the input and of the weight."""
    grid, shape = fake_quant.grid, weight.shape
    w_qparams = weight_qparams(weight, fake_quant, step_size)
    blocks = quantize_blocks(weight, w_qparams, grid, rounding_noise(weight, fake_quant))
    w_codes = join_weight(blocks, shape, grid).to(CODES)
    w_scale = join_scale([q.scale for q in w_qparams], shape, grid).float().expand(shape[0])
    x_qparams = input_qparams(x, input_grid, fixed_range)
    x_codes = quantize_block(x.float(), x_qparams, input_grid).to(CODES).view(-1, shape[1])
    x_scale = x_qparams.scale.float().reshape(-1).expand(len(x_codes))
    y = _product(x_codes, w_codes, x_scale, w_scale, out_dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(out_dtype).view(*x.shape[:-1], shape[0]), [x_qparams], w_qparams


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    rows, columns = x_scale.view(-1, 1).contiguous(), w_scale.view(1, -1).contiguous()
    if out_dtype is torch.bfloat16:
        return torch._scaled_mm(x, weight.t(), rows, columns, out_dtype=out_dtype)
    # The kernels that scale rows and columns themselves give bf16 only.
    one = torch.ones((), device=x.device)
    sums = torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.float32)
    return sums.mul_(rows).mul_(columns)
