"""Every grid against its formula in float64, and the promises for zeros, NaN, Inf and odd shapes."""

from __future__ import annotations

import math

import pytest
import torch

from ds_compress.quant.arithmetic import dequantize_, quantize_block, unclipped_interval
from ds_compress.quant.grid import ActivationGrid, Granularity, WeightGrid
from ds_compress.quant.layout import (
    check_shape,
    join_weight,
    scale_shape,
    split_scale,
    split_weight,
)
from ds_compress.quant.qparams import qparams_from_range
from ds_compress.quant.weights import dequantize, fake_quantize, initial_scale, quantize


def formula(row: list[float], grid: WeightGrid) -> list[float]:
    """One group through the formulas of the removed library (narrow: ours), in Python's float64."""
    bits, largest = grid.bits, max(abs(v) for v in row)
    if bits == 1 and not grid.learned:
        mean = sum(abs(v) for v in row) / len(row)
        return [math.copysign(mean, v) if v else 0.0 for v in row]
    if bits == 2 and not grid.learned:
        threshold = 0.7 * sum(abs(v) for v in row) / len(row)
        kept = [abs(v) for v in row if abs(v) > threshold]
        alpha = sum(kept) / len(kept) if kept else 0.0
        return [math.copysign(alpha, v) if abs(v) > threshold else 0.0 for v in row]
    if grid.symmetric:
        half = 2 ** (bits - 1)
        scale = largest / (half - 1) if grid.narrow_range else 2 * largest / 2**bits
        if scale == 0:
            return [0.0] * len(row)
        low = -half + 1 if grid.narrow_range else -half
        return [min(max(round(v / scale), low), half - 1) * scale for v in row]
    scale = (max(row) - min(row)) / (2**bits - 1 if grid.narrow_range else 2**bits)
    if scale == 0:
        return row
    zero = round(min(row) / scale) * scale
    return [min(max(round((v - zero) / scale), 0), 2**bits - 1) * scale + zero for v in row]


def groups_of(weight: torch.Tensor, grid: WeightGrid) -> list[torch.Tensor]:
    """Index sets of the groups, by plain slicing that shares nothing with the library."""
    index = torch.arange(weight.numel()).view(weight.shape)
    match grid.granularity:
        case Granularity.PER_TENSOR:
            return [index.flatten()]
        case Granularity.PER_GROUP:
            return list(index.flatten().chunk(grid.groups))
    channels = [index.select(grid.channel_axis, i).flatten() for i in range(weight.shape[grid.channel_axis])]
    if grid.granularity is Granularity.PER_CHANNEL:
        return channels
    return [part for channel in channels for part in channel.split(grid.group_size)]


UNIFORM = [(b, s, n) for b in (3, 4, 8) for s in (True, False) for n in (True, False)]
LEVELS = [(1, True, False), (2, True, False), *UNIFORM]
LAYOUTS = [
    {"granularity": Granularity.PER_TENSOR},
    {"granularity": Granularity.PER_GROUP, "groups": 5},
    {"granularity": Granularity.PER_CHANNEL},
    {"granularity": Granularity.PER_CHANNEL, "channel_axis": 1},
    {"granularity": Granularity.PER_COLUMN_GROUP, "group_size": 4},
    {"granularity": Granularity.PER_COLUMN_GROUP, "group_size": 4, "channel_axis": 1},
    {"granularity": Granularity.PER_COLUMN_GROUP, "group_size": 1000},
]


def make_grid(levels: tuple[int, bool, bool], layout: dict) -> WeightGrid:
    bits, symmetric, narrow = levels
    return WeightGrid(bits=bits, symmetric=symmetric, narrow_range=narrow, **layout)


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


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_takes_apart_and_joins(layout):
    grid = WeightGrid(8, **layout)
    for shape in [(10, 7), (5, 4, 3, 2)]:
        if grid.channel_axis and len(shape) > 2:
            continue
        weight = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        blocks = split_weight(weight, grid)
        assert torch.equal(join_weight([block.clone() for block in blocks], shape, grid), weight)
        scale = torch.arange(math.prod(scale_shape(shape, grid)), dtype=torch.float32)
        parts = split_scale(scale.view(scale_shape(shape, grid)), shape, grid)
        marked = [torch.zeros_like(b) + p for b, p in zip(blocks, parts, strict=True)]
        groups = groups_of(weight, grid)
        owner = join_weight(marked, shape, grid).flatten()
        assert {tuple(owner[index].unique().tolist()) for index in groups} == {
            (float(i),) for i in range(len(groups))
        }


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


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_interval_is_exactly_the_rounding_rule(bits, symmetric, narrow, dtype):
    grid = ActivationGrid(bits, symmetric, narrow)
    low, high = unclipped_interval(grid, dtype)
    for edge in (grid.quant_min - 0.5, grid.quant_max + 0.5):
        exact = torch.tensor(edge, dtype=dtype)
        around = torch.stack([exact, *(torch.nextafter(exact, exact + way) for way in (-1, 1))])
        by_rule = (around.round() >= grid.quant_min) & (around.round() <= grid.quant_max)
        assert torch.equal((around > low) & (around < high), by_rule)


def test_fixed_range_saturates_but_keeps_nan():
    grid = ActivationGrid(8, static=True)
    qparams = qparams_from_range(torch.tensor(-1.0), torch.tensor(2.0), grid)
    x = torch.tensor([5.0, -5.0, math.inf, math.nan, 0.5])
    y = dequantize_(quantize_block(x, qparams, grid), qparams)
    torch.testing.assert_close(
        y, torch.tensor([127 / 64, -2.0, 127 / 64, math.nan, 0.5]), equal_nan=True, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 0},
        {"bits": 9},
        {"bits": 2, "symmetric": False},
        {"bits": 1, "stochastic": True},
        {"bits": 1, "learned": True},
        {"bits": 4, "learned": True, "symmetric": False},
        {"bits": 4, "learned": True, "stochastic": True},
        {"bits": 4, "groups": 0},
    ],
)
def test_grids_without_a_formula_are_refused(wrong):
    with pytest.raises(ValueError, match=r"bits|bit|least"):
        WeightGrid(**wrong)


def test_shapes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        check_shape((3, 5), WeightGrid(8, groups=4))
    with pytest.raises(ValueError, match="2 or more axes"):
        check_shape((3,), WeightGrid(8, granularity=Granularity.PER_CHANNEL))


def test_initial_scale_is_the_papers():
    weight = torch.randn(3, 10)
    grid = WeightGrid(4, narrow_range=True, learned=True, granularity=Granularity.PER_CHANNEL)
    expected = 2 * weight.abs().mean(1) / math.sqrt(7)
    torch.testing.assert_close(initial_scale(weight, grid), expected)
