"""Values up to the largest float: nothing finite becomes NaN or Inf, and everything stays within a step."""

from __future__ import annotations

import pytest
import torch

from ds_compress.ops import reference as ops_reference
from ds_compress.ops.library import native
from ds_compress.quant.arithmetic import working_dtype
from ds_compress.quant.fake_quant import FakeQuantConfig, fake_quantize_input, fake_quantize_weight
from ds_compress.quant.grid import ActivationGrid, Granularity, TokenGranularity, WeightGrid
from ds_compress.quant.weights import dequantize, fake_quantize, initial_scale, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHARES = [1.0, 0.999, 0.97, 0.5]
WEIGHT_GRIDS = [
    WeightGrid(bits, symmetric, narrow, granularity, groups=4, group_size=8, stochastic=stochastic)
    for bits in range(1, 9)
    for symmetric in (True, False)
    for narrow in (True, False)
    for granularity in Granularity
    for stochastic in (False, True)
    if (bits > 2 or (symmetric and not narrow and not stochastic))
]


def rows(dtype: torch.dtype, share: float) -> torch.Tensor:
    """(8, 32): both signs, one sign, lopsided, alone among zeros, tiny beside huge, all equal; up to `share` of max."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((8, 32), generator=generator, dtype=torch.float64)
    x[1] = x[1].abs()
    x[2] = -x[2].abs()
    x[3] = torch.where(x[3] > 0, x[3] * 1e-3, x[3])
    x[4] = 0
    x[4, 5] = -1
    x[5, ::2] *= 1e-30
    x[6] = torch.where(x[6] > 0, 1.0, -1.0)
    x[7] = 1
    return (x / x.abs().amax(1, keepdim=True) * torch.finfo(dtype).max * share).to(dtype)


def test_weights_stay_finite_and_within_a_step_of_themselves() -> None:
    for dtype in DTYPES:
        for share in SHARES:
            weight = rows(dtype, share)
            noise = torch.rand(weight.shape, dtype=working_dtype(weight))
            for grid in WEIGHT_GRIDS:
                where = (dtype, share, grid)
                quantized = fake_quantize(weight, grid, noise if grid.stochastic else None)
                assert quantized.isfinite().all(), where
                fused = fake_quantize_weight(weight, FakeQuantConfig(grid, noise_key=1)).values
                assert fused.isfinite().all(), where
                integers = quantize(weight, grid, noise if grid.stochastic else None)
                assert torch.equal(dequantize(integers, dtype), quantized), where
                if grid.bits > 2:
                    if not grid.stochastic:
                        assert torch.equal(fused, quantized), where
                    # Half a step, one more where the grid does not reach, and the dtype's own rounding; of halves,
                    # whose difference is finite.
                    largest = weight.double().abs().amax()
                    bound = 1.51 * largest / (2 ** (grid.bits - 1) - 1) + torch.finfo(dtype).eps * largest
                    error = 2 * (quantized.double() / 2 - weight.double() / 2).abs()
                    assert (error <= bound).all(), where


@pytest.mark.parametrize("bits", [1, 2])
def test_binary_and_ternary_scales_are_the_means_they_should_be(bits: int) -> None:
    weight = rows(torch.float32, 1.0)
    grid = WeightGrid(bits, granularity=Granularity.PER_CHANNEL)
    found = quantize(weight, grid).scale.double().view(-1)
    exact = weight.double().abs()
    mean = exact.mean(1)
    if bits == 1:
        expected = mean
    else:
        beyond = exact > 0.7 * mean[:, None]
        expected = (exact * beyond).sum(1) / beyond.sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_learned_scales_begin_finite() -> None:
    for bits in (2, 4, 8):
        grid = WeightGrid(bits, learned=True, granularity=Granularity.PER_CHANNEL)
        assert initial_scale(rows(torch.float32, 1.0), grid).isfinite().all()


def test_inputs_stay_finite_on_every_grid() -> None:
    for dtype in DTYPES:
        for share in SHARES:
            x = rows(dtype, share)
            for bits in (3, 4, 8):
                for symmetric in (True, False):
                    for granularity in TokenGranularity:
                        grid = ActivationGrid(bits, symmetric, granularity=granularity, group_size=x.shape[1])
                        assert fake_quantize_input(x, grid).values.isfinite().all(), (dtype, share, grid)
                    static = ActivationGrid(
                        bits, symmetric, granularity=TokenGranularity.PER_TENSOR, static=True
                    )
                    ends = torch.stack([x.amin(), x.amax()]).float().clamp(-3.4028e38, 3.4028e38)
                    assert fake_quantize_input(x.float(), static, ends).values.isfinite().all()


def test_native_and_reference_agree_to_the_bit() -> None:
    for dtype in DTYPES[:3]:
        for share in SHARES:
            x = rows(dtype, share)
            for grid in (g for g in WEIGHT_GRIDS if g.bits > 2 and not g.stochastic):
                arguments = {
                    "quant_min": grid.quant_min,
                    "quant_max": grid.quant_max,
                    "steps": grid.scale_divisor,
                    "symmetric": grid.symmetric,
                }
                mine = native().fake_quantize(x, **arguments, with_mask=True)
                theirs = ops_reference.IMPLEMENTATIONS["fake_quantize"](x, **arguments, with_mask=True)
                for a, b in zip(mine, theirs, strict=True):
                    assert torch.equal(a, b), (dtype, share, grid)


def test_a_fault_among_huge_values_is_still_seen() -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        weight = rows(torch.float32, 1.0)
        weight[1, 3] = bad
        for bits, symmetric in ((1, True), (2, True), (4, True), (4, False), (8, True), (8, False)):
            grid = WeightGrid(bits, symmetric, granularity=Granularity.PER_CHANNEL)
            quantized = fake_quantize(weight, grid)
            assert quantized[1].isnan().all() and quantized[[0, 2]].isfinite().all(), (bad, grid)
            assert fake_quantize_weight(weight, FakeQuantConfig(grid)).values[1].isnan().all()
