"""Every grid against its formula in float64, and the promises for zeros, NaN, Inf and odd shapes."""

from __future__ import annotations

import math

import pytest
import torch

from ds_compress.quant.grid import Granularity, WeightGrid
from ds_compress.quant.layout import (
    scale_shape,
)
from ds_compress.quant.weights import dequantize, fake_quantize, initial_scale, quantize
from tests.unit.quant.grids import LAYOUTS, LEVELS, formula, groups_of, make_grid


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_equals_the_formula(levels, layout):
    grid = make_grid(levels, layout)
    weight = torch.randn(10, 7, generator=torch.Generator().manual_seed(sum(levels)))
    got = fake_quantize(weight, grid).flatten().double()
    for index in groups_of(weight, grid):
        expected = torch.tensor(formula(weight.flatten()[index].double().tolist(), grid), dtype=torch.float64)
        torch.testing.assert_close(got[index], expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_integers_read_back_are_the_fake_quantized_weight(levels, layout):
    grid = make_grid(levels, layout)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weight = torch.randn(10, 7).to(dtype)
        stored = quantize(weight, grid)
        assert stored.values.dtype is (torch.int8 if grid.symmetric else torch.uint8)
        assert stored.values.shape == weight.shape
        assert stored.scale.shape == scale_shape(weight.shape, grid)
        assert stored.scale.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert torch.equal(dequantize(stored, dtype), fake_quantize(weight, grid))
        codes = stored.values.to(torch.int32)
        assert codes.min() >= grid.quant_min and codes.max() <= grid.quant_max


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_zero_groups_stay_zero(levels, layout):
    grid = make_grid(levels, layout)
    weight = torch.randn(10, 7)
    weight[3:6], weight[:, 2] = 0.0, 0.0
    quantized = fake_quantize(weight, grid)
    assert quantized.isfinite().all()
    if grid.symmetric:
        assert (quantized[weight == 0] == 0).all()
    assert torch.equal(fake_quantize(torch.zeros(10, 7), grid), torch.zeros(10, 7))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("constant", [0.0, 1.0, -3.7, 1e-30, -2e20])
def test_constant_asymmetric_group_is_exact(constant, narrow):
    grid = WeightGrid(8, symmetric=False, narrow_range=narrow)
    weight = torch.full((3, 4), constant)
    assert torch.equal(fake_quantize(weight, grid), weight)
    assert torch.equal(dequantize(quantize(weight, grid)), weight)


@pytest.mark.parametrize("levels", [(8, True, True), (3, True, False), (8, False, False)])
def test_subnormal_groups_stay_near(levels):
    grid = make_grid(levels, {"granularity": Granularity.PER_CHANNEL})
    weight = torch.randn(4, 9) * 1e-40
    quantized = fake_quantize(weight, grid)
    assert quantized.isfinite().all()
    assert (quantized - weight).abs().max() <= 2.0**-126


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_a_fault_makes_its_group_nan_and_no_other(levels, fault):
    grid = make_grid(levels, {"granularity": Granularity.PER_CHANNEL})
    weight = torch.randn(4, 9)
    weight[2, 5] = fault
    quantized = fake_quantize(weight, grid)
    assert quantized[2].isnan().all()
    assert quantized[[0, 1, 3]].isfinite().all()
    assert torch.equal(dequantize(quantize(weight, grid)).isnan(), quantized.isnan())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("shape", [(0, 7), (10, 0)])
def test_empty(levels, layout, shape):
    grid = make_grid(levels, layout)
    if math.prod(scale_shape(shape, grid)) == 0 or grid.granularity is not Granularity.PER_GROUP:
        assert fake_quantize(torch.empty(shape), grid).shape == shape


def test_narrow_range_keeps_the_largest_value_and_legacy_does_not():
    weight = torch.tensor([[1.0, -1.0, 0.3]])
    assert fake_quantize(weight, WeightGrid(8))[0, 0] == 127 / 128
    narrow = fake_quantize(weight, WeightGrid(8, narrow_range=True))
    torch.testing.assert_close(narrow[0, :2], torch.tensor([1.0, -1.0]))


def test_conv1d_channels_are_columns():
    weight = torch.randn(6, 4)
    grid = WeightGrid(8, narrow_range=True, granularity=Granularity.PER_CHANNEL)
    transposed = WeightGrid(8, narrow_range=True, granularity=Granularity.PER_CHANNEL, channel_axis=1)
    assert torch.equal(fake_quantize(weight, transposed), fake_quantize(weight.t().contiguous(), grid).t())


def test_stochastic_rounding_is_unbiased_and_on_the_grid():
    grid = WeightGrid(4, granularity=Granularity.PER_TENSOR, narrow_range=True, stochastic=True)
    weight = torch.linspace(-1, 1, 201).view(3, 67)
    scale = 1 / 7
    draws = torch.stack([fake_quantize(weight, grid, noise=torch.rand(weight.shape)) for _ in range(4000)])
    codes = draws / scale
    assert (codes - codes.round()).abs().max() < 1e-5
    error = draws.mean(0) - weight
    assert error.abs().max() < 5 * 0.5 * scale / math.sqrt(4000)
    assert draws.abs().max() <= 1 + 1e-6


def test_initial_scale_is_the_papers():
    weight = torch.randn(3, 10)
    grid = WeightGrid(4, narrow_range=True, learned=True, granularity=Granularity.PER_CHANNEL)
    expected = 2 * weight.abs().mean(1) / math.sqrt(7)
    torch.testing.assert_close(initial_scale(weight, grid), expected)
