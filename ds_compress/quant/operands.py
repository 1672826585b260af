"""Fake-quantized weights and inputs as a layer uses them now, given the ranges that were measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_compress.ops.counter_rng import uniform
from ds_compress.quant.fused import FakeQuantized, fake_quantize_rows, input_rows, weight_rows
from ds_compress.quant.grid import (
    ActivationGrid,
    Ranges,
    TokenGranularity,
    WeightGrid,
    decode_,
    encode_weight,
    learned_ranges,
    measure,
    normalize,
    ranges_between,
    round_codes_,
    weight_ranges,
    within,
    working_dtype,
)
from ds_compress.quant.layout import join_weight, split_weight


@dataclass(frozen=True)
class FakeQuantConfig:
    """How a weight is quantized now: y = real_share * w + (1 - real_share) * Q(w).

    `noise_key`: the key of `counter_rng.uniform` for stochastic rounding; `step_ratio`: what a learned step
    size is multiplied by to serve fewer or more codes than it was made for; `clipped_ste`: whether clipped
    weights get no gradient (learned scales need that) or a plain straight-through one; `integer`: whether a
    layer multiplies the codes themselves (see `integer_product`) once its input has codes too.
    """

    grid: WeightGrid
    noise_key: int = 0
    blend_ratio: float = 0.0
    step_ratio: float = 1.0
    clipped_ste: bool = True
    integer: bool = False

    @property
    def changes_gradient(self) -> bool:
        return self.clipped_ste and self.grid.may_clip


def recipe_ranges(
    weight: torch.Tensor, fake_quant: FakeQuantConfig, step_size: torch.Tensor | None = None
) -> list[Ranges]:
    """Measured ranges, or those of learned step sizes, of each block of `layout.split_weight`."""
    if step_size is None:
        return weight_ranges(weight, fake_quant.grid)
    scale = step_size.to(working_dtype(weight)) * fake_quant.step_ratio
    return learned_ranges(scale, weight.shape, fake_quant.grid)


def quantize_weight(
    weight: torch.Tensor,
    fake_quant: FakeQuantConfig,
    step_size: torch.Tensor | None = None,
    ranges: list[Ranges] | None = None,
    keep: bool = False,
) -> FakeQuantized:
    """real_share * w + (1 - real_share) * Q(w) in the dtype and shape of the weight.

    `ranges`: those of an earlier call, else measured, or learned when there is a `step_size`; `keep`: also say
    which weights did not clip, where one pass can (else `kept` is None).
    """
    grid = fake_quant.grid
    if ranges is None and step_size is not None:
        ranges = recipe_ranges(weight, fake_quant, step_size)
    # A blend is computed in fp32 and cast last, which one pass over a 16-bit weight cannot do.
    is_blended = bool(fake_quant.blend_ratio) and weight.dtype is not torch.float32
    rows = None if is_blended else weight_rows(weight, grid)
    if rows is not None:
        one_pass = fake_quantize_rows(rows, grid, None if ranges is None else ranges[0], keep)
        groups = split_weight(weight.contiguous(), grid)[0].shape[:-2]
        shaped = [_broadcast(r, (*groups, 1, 1)) for r in one_pass.ranges]
        values, kept = one_pass.values.view(weight.shape), one_pass.kept
        ranges = ranges or shaped
    else:
        ranges = ranges or weight_ranges(weight, grid)
        blocks = encode_weight(weight, ranges, grid, rounding_noise(weight, fake_quant))
        decoded = [decode_(block, r) for block, r in zip(blocks, ranges, strict=True)]
        values, kept = within(join_weight(decoded, weight.shape, grid), weight.dtype), None
    if fake_quant.blend_ratio:
        values = values.mul_(1 - fake_quant.blend_ratio).add_(weight, alpha=fake_quant.blend_ratio)
    return FakeQuantized(values.to(weight.dtype), ranges, kept)


def rounding_noise(weight: torch.Tensor, fake_quant: FakeQuantConfig) -> torch.Tensor | None:
    """The noise of stochastic rounding for each weight, the same whenever the recipe is."""
    if not fake_quant.grid.stochastic:
        return None
    return uniform(weight.shape, fake_quant.noise_key, device=weight.device).to(working_dtype(weight))


def quantize_input(
    x: torch.Tensor,
    grid: ActivationGrid,
    fixed_range: torch.Tensor | None = None,
    ranges: Ranges | None = None,
    keep: bool = False,
) -> FakeQuantized:
    """Q(x) in the dtype and shape of x.

    `fixed_range`: the two numbers (min, max) of a static grid; `ranges`: those of an earlier call, else
    measured; `keep`: also say which values did not clip, where one pass can (else `kept` is None).
    """
    if ranges is None and (grid.static or grid.granularity is TokenGranularity.PER_TENSOR):
        ranges = input_ranges(x, grid, fixed_range)
    rows = input_rows(x, grid)
    if rows is None:
        ranges = ranges or input_ranges(x, grid, fixed_range)
        normalized = normalize(x.to(working_dtype(x)), ranges)
        return FakeQuantized(
            within(decode_(round_codes_(normalized, grid), ranges), x.dtype).to(x.dtype), [ranges]
        )
    one_pass = fake_quantize_rows(rows, grid, ranges, keep)
    if ranges is None:
        axes = 1 if grid.granularity is TokenGranularity.PER_TOKEN else x.dim() - 1
        ranges = _broadcast(one_pass.ranges[0], (*x.shape[: x.dim() - axes], *[1] * axes))
    return FakeQuantized(one_pass.values.view(x.shape), [ranges], one_pass.kept)


def _broadcast(ranges: Ranges, shape: tuple[int, ...]) -> Ranges:
    """Ranges of rows in the shape that broadcasts over the values."""
    offset = None if ranges.offset is None else ranges.offset.view(shape)
    return Ranges(ranges.scale.view(shape), offset)


def input_ranges(x: torch.Tensor, grid: ActivationGrid, fixed_range: torch.Tensor | None) -> Ranges:
    """The ranges of x, measured on it or, static, between the two numbers (min, max) of `fixed_range`."""
    x = x.to(working_dtype(x))
    if grid.static:
        if fixed_range is None:
            raise ValueError("a static activation grid needs a range")
        lowest, highest = fixed_range.to(x.dtype).unbind()
        return ranges_between(lowest, highest, grid)
    match grid.granularity:
        case TokenGranularity.PER_TOKEN:
            return measure(x, (-1,), grid)
        case TokenGranularity.PER_SAMPLE:
            return measure(x, tuple(range(1, x.dim())), grid)
        case TokenGranularity.PER_TENSOR:
            return measure(x, tuple(range(x.dim())), grid)
