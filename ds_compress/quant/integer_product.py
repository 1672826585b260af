"""The product of integer codes as the forward of a QAT layer: training sees the integers that deployment will run.

y = (sum over k of codes_x[m, k] * codes_w[n, k]) * (scale_x[m] * scale_w[n]) + bias[n], by the op `int8_linear`, in
which the sum is exact. The float path multiplies the same codes after scaling them, so both differ by rounding only.
Backward is that of the float path: straight through, in the training dtype.
"""

from __future__ import annotations

import torch

from ds_compress.ops import kernels
from ds_compress.quant.grid import ActivationGrid, Levels, Ranges, TokenGranularity, WeightGrid, encode_weight
from ds_compress.quant.layout import join_scale, join_weight
from ds_compress.quant.operands import FakeQuantConfig, input_ranges, recipe_ranges, rounding_noise


def multiplies_codes(fake_quant: FakeQuantConfig, x: torch.Tensor) -> bool:
    """Whether a forward whose operands are both quantized multiplies their codes: no real weight is blended in."""
    return fake_quant.integer and not fake_quant.blend_ratio and x.dtype is not torch.float64


def integer_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    fake_quant: FakeQuantConfig,
    input_grid: ActivationGrid,
    step_size: torch.Tensor | None,
    fixed_range: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, list[Ranges], list[Ranges]]:
    """y `[..., out]` in `out_dtype`, the input's ranges (empty when the kernel measured them), the weight's."""
    ranges = recipe_ranges(weight, fake_quant, step_size)
    x_ranges = []
    if input_grid.static or input_grid.granularity is TokenGranularity.PER_TENSOR:
        x_ranges = [input_ranges(x, input_grid, fixed_range)]
    y = kernels().int8_linear(
        x.contiguous(),
        _packed(weight, fake_quant, ranges),
        _scale_per_output(weight, fake_quant.grid, ranges),
        None if bias is None else bias.float(),
        x_ranges[0].scale.reshape(1) if x_ranges else None,
        steps=input_grid.steps,
        out_dtype=out_dtype,
    )
    return y, x_ranges, ranges


def _packed(weight: torch.Tensor, fake_quant: FakeQuantConfig, ranges: list[Ranges]) -> torch.Tensor:
    grid = fake_quant.grid
    one_pass = (
        grid.levels is Levels.UNIFORM and grid.bits == 8 and not grid.stochastic and not grid.channel_axis
    )
    if one_pass:
        scale = _scale_per_output(weight, grid, ranges)
        return kernels().int8_linear_quantize_pack(weight.contiguous(), scale, grid.steps)
    codes = join_weight(
        encode_weight(weight, ranges, grid, rounding_noise(weight, fake_quant)), weight.shape, grid
    )
    codes = codes.nan_to_num_(0.0).to(torch.int8)
    return kernels().int8_linear_pack((codes.t() if grid.channel_axis else codes).contiguous())


def _scale_per_output(weight: torch.Tensor, grid: WeightGrid, ranges: list[Ranges]) -> torch.Tensor:
    """fp32 `[out]`: the scale of each output channel, whatever shares it."""
    outputs = weight.shape[grid.channel_axis]
    scale = join_scale([r.scale for r in ranges], weight.shape, grid).to(torch.float32).reshape(-1)
    return (
        scale.repeat_interleave(outputs // scale.numel()) if scale.numel() != outputs else scale.contiguous()
    )
