"""Fake-quantized weights and inputs as a layer uses them now, given the ranges that were measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_compress.quant.counter_rng import uniform
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
    working_dtype,
)
from ds_compress.quant.layout import join_weight


@dataclass(frozen=True)
class WeightRecipe:
    """How a weight is quantized now: y = real_share * w + (1 - real_share) * Q(w).

    `noise_key`: the key of `counter_rng.uniform` for stochastic rounding; `step_ratio`: what a learned step
    size is multiplied by to serve fewer or more codes than it was made for; `masks_clipped`: whether clipped
    weights get no gradient (learned scales need that) or a plain straight-through one.
    """

    grid: WeightGrid
    noise_key: int = 0
    real_share: float = 0.0
    step_ratio: float = 1.0
    masks_clipped: bool = True

    @property
    def changes_gradient(self) -> bool:
        return self.masks_clipped and self.grid.may_clip


def recipe_ranges(
    weight: torch.Tensor, recipe: WeightRecipe, step_size: torch.Tensor | None = None
) -> list[Ranges]:
    """Measured ranges, or those of learned step sizes, of each block of `layout.split_weight`."""
    if step_size is None:
        return weight_ranges(weight, recipe.grid)
    scale = step_size.to(working_dtype(weight)) * recipe.step_ratio
    return learned_ranges(scale, weight.shape, recipe.grid)


def fake_quantize_weight(weight: torch.Tensor, recipe: WeightRecipe, ranges: list[Ranges]) -> torch.Tensor:
    """real_share * w + (1 - real_share) * Q(w) in the dtype and shape of the weight."""
    blocks = encode_weight(weight, ranges, recipe.grid, rounding_noise(weight, recipe))
    decoded = [decode_(block, r) for block, r in zip(blocks, ranges, strict=True)]
    quantized = join_weight(decoded, weight.shape, recipe.grid)
    if recipe.real_share:
        quantized.mul_(1 - recipe.real_share).add_(weight, alpha=recipe.real_share)
    return quantized.to(weight.dtype)


def rounding_noise(weight: torch.Tensor, recipe: WeightRecipe) -> torch.Tensor | None:
    """The noise of stochastic rounding for each weight, the same whenever the recipe is."""
    if not recipe.grid.stochastic:
        return None
    return uniform(weight.shape, recipe.noise_key, device=weight.device).to(working_dtype(weight))


def fake_quantize_input(x: torch.Tensor, grid: ActivationGrid, ranges: Ranges) -> torch.Tensor:
    """Q(x) in the dtype and shape of x."""
    normalized = normalize(x.to(working_dtype(x)), ranges)
    return decode_(round_codes_(normalized, grid), ranges).to(x.dtype)


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
