"""A linear op on integers as the forward of a QAT layer: training sees the integers that deployment will run.

y = (sum over k of q_x[m, k] * q_w[n, k]) * (scale_x[m] * scale_w[n]) + bias[n], by the op `int8_linear`, in which the
sum is exact. The float path multiplies the same numbers after scaling them, so both differ by rounding only.

Backward is that of the float path: straight through, in the training dtype. With `FakeQuantConfig.backward` "int8" the
gradient of the input is a product of integers, too, as in SwitchBack (Wortsman et al. 2023, "Stable and low-precision
training for large-scale vision-language models", algorithm 1); that of the weight, whose sums are long, never is.
"""

from __future__ import annotations

import torch

from ds_compress.ops import kernels
from ds_compress.quant.fake_quant import FakeQuantConfig, input_qparams, rounding_noise, weight_qparams
from ds_compress.quant.grid import ActivationGrid, Levels, TokenGranularity, WeightGrid
from ds_compress.quant.layout import join_scale, join_weight
from ds_compress.quant.qparams import QParams
from ds_compress.quant.weights import quantize_blocks


def runs_on_integers(fake_quant: FakeQuantConfig, x: torch.Tensor) -> bool:
    """Whether a forward that quantizes input and weight multiplies integers: nothing unquantized is blended in."""
    return fake_quant.kernel == "int8" and not fake_quant.blend_ratio and x.dtype is not torch.float64


def integer_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    fake_quant: FakeQuantConfig,
    input_grid: ActivationGrid,
    step_size: torch.Tensor | None,
    fixed_range: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, list[QParams], list[QParams]]:
    """y `[..., out]` in `out_dtype`, the QParams of the input (empty when the kernel chose them) and of the weight."""
    qparams = weight_qparams(weight, fake_quant, step_size)
    x_qparams = []
    if input_grid.static or input_grid.granularity is TokenGranularity.PER_TENSOR:
        x_qparams = [input_qparams(x, input_grid, fixed_range)]
    y = kernels().int8_linear(
        x.contiguous(),
        _packed(weight, fake_quant, qparams),
        _scale_per_output(weight, fake_quant.grid, qparams),
        None if bias is None else bias.float(),
        x_qparams[0].scale.reshape(1) if x_qparams else None,
        steps=input_grid.scale_divisor,
        out_dtype=out_dtype,
    )
    return y, x_qparams, qparams


def multiplies_gradients(fake_quant: FakeQuantConfig, grad: torch.Tensor) -> bool:
    """Whether the gradient of the input of a layer that `runs_on_integers` is a product of integers."""
    return fake_quant.backward == "int8" and runs_on_integers(fake_quant, grad)


def input_gradient(
    grad: torch.Tensor, weight: torch.Tensor, fake_quant: FakeQuantConfig, qparams: list[QParams]
) -> torch.Tensor:
    """grad `[..., out]` times the quantized weight, `[..., in]` in the dtype of `grad`.

    The sum runs over outputs, so the scales of the weight belong to grad: each row of grad * scale_w is rounded to the
    nearest of 255 integers, with a scale of its own, and multiplied by the integers of the weight. A row with NaN or
    Inf stays one, which is how a step with fp16 finds out that it must be skipped.
    """
    scaled = grad.float() * _scale_per_output(weight, fake_quant.grid, qparams)
    packed = _packed_by_input(weight, fake_quant, qparams)
    inputs = weight.shape[1 - fake_quant.grid.channel_axis]
    return kernels().int8_linear(
        scaled.contiguous(), packed, scaled.new_ones(inputs), None, None, steps=127, out_dtype=grad.dtype
    )


def _packed(weight: torch.Tensor, fake_quant: FakeQuantConfig, qparams: list[QParams]) -> torch.Tensor:
    grid = fake_quant.grid
    if _is_rounded_while_packing(grid) and not grid.channel_axis:
        scale = _scale_per_output(weight, grid, qparams)
        return kernels().int8_linear_quantize_pack(weight.contiguous(), scale, grid.scale_divisor)
    codes = _codes(weight, fake_quant, qparams)
    return kernels().int8_linear_pack((codes.t() if grid.channel_axis else codes).contiguous())


def _packed_by_input(
    weight: torch.Tensor, fake_quant: FakeQuantConfig, qparams: list[QParams]
) -> torch.Tensor:
    """The same codes, transposed."""
    grid = fake_quant.grid
    if _is_rounded_while_packing(grid):
        scale = _scale_per_output(weight, grid, qparams)
        by_input = weight / scale if grid.channel_axis else (weight / scale.unsqueeze(1)).t()
        return kernels().int8_linear_quantize_pack(
            by_input.contiguous(), scale.new_ones(1), grid.scale_divisor
        )
    codes = _codes(weight, fake_quant, qparams)
    return kernels().int8_linear_pack((codes if grid.channel_axis else codes.t()).contiguous())


def _is_rounded_while_packing(grid: WeightGrid) -> bool:
    return grid.levels is Levels.UNIFORM and grid.bits == 8 and not grid.stochastic


def _codes(weight: torch.Tensor, fake_quant: FakeQuantConfig, qparams: list[QParams]) -> torch.Tensor:
    blocks = quantize_blocks(weight, qparams, fake_quant.grid, rounding_noise(weight, fake_quant))
    return join_weight(blocks, weight.shape, fake_quant.grid).nan_to_num_(0.0).to(torch.int8)


def _scale_per_output(weight: torch.Tensor, grid: WeightGrid, qparams: list[QParams]) -> torch.Tensor:
    """fp32 `[out]`: the scale of each output channel, whatever shares it."""
    outputs = weight.shape[grid.channel_axis]
    scale = join_scale([q.scale for q in qparams], weight.shape, grid).to(torch.float32).reshape(-1)
    if scale.numel() == outputs:
        return scale.contiguous()
    return scale.repeat_interleave(outputs // scale.numel())
