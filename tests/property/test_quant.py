"""Quantizers on arbitrary weights: odd sizes, extreme values, every grid."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_compress.ops.counter_rng import uniform
from ds_compress.quant.arithmetic import normalize
from ds_compress.quant.grid import Granularity, WeightGrid
from ds_compress.quant.layout import join_weight, scale_shape, split_weight
from ds_compress.quant.weights import choose_weight_qparams, dequantize, fake_quantize, quantize

finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


@st.composite
def weights(draw, elements=finite):
    shape = draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))
    values = draw(st.lists(elements, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values, dtype=torch.float32).view(shape)


@st.composite
def weight_and_grid(draw, elements=finite, fewest_bits=1):
    weight, bits = draw(weights(elements)), draw(st.integers(fewest_bits, 8))
    # Square blocks are for floats: see tests/unit/quant/test_float_grids.py.
    granularity = draw(st.sampled_from([g for g in Granularity if g is not Granularity.PER_BLOCK]))
    return weight, WeightGrid(
        bits=bits,
        symmetric=bits <= 2 or draw(st.booleans()),
        narrow_range=draw(st.booleans()),
        granularity=granularity,
        groups=draw(st.sampled_from([n for n in range(1, 9) if weight.numel() % n == 0])),
        group_size=draw(st.integers(1, 9)),
        channel_axis=draw(st.integers(0, 1)) if weight.dim() == 2 else 0,
    )


@given(weight_and_grid())
@settings(max_examples=300, deadline=None)
def test_reads_back_bitwise_and_finite(case):
    weight, grid = case
    stored = quantize(weight, grid)
    read = dequantize(stored)
    assert torch.equal(read, fake_quantize(weight, grid))
    assert read.isfinite().all()
    assert stored.scale.shape == scale_shape(weight.shape, grid)
    assert (stored.scale >= 0).all()


@given(weight_and_grid(fewest_bits=3))
@settings(max_examples=300, deadline=None)
def test_error_is_bounded_in_steps(case):
    """Half a step by rounding; a clipped end costs one step, and the rounded offset half a step more."""
    weight, grid = case
    stored = quantize(weight, grid)
    error = split_weight(dequantize(stored) - weight, grid)
    values = split_weight(weight, grid)
    for err, value, qparams in zip(error, values, choose_weight_qparams(weight, grid), strict=True):
        steps = 0.5 + 0.5 * (not grid.narrow_range) + 0.5 * (not grid.symmetric)
        slack = 4e-7 * value.abs().amax(-2, keepdim=True)
        assert (err.abs() <= steps * qparams.scale * (1 + 1e-5) + slack).all()


@given(weight_and_grid(fewest_bits=3))
@settings(max_examples=200, deadline=None)
def test_a_narrow_symmetric_weight_never_clips(case):
    weight, grid = case
    if not (grid.symmetric and grid.narrow_range):
        return
    for block, qparams in zip(split_weight(weight, grid), choose_weight_qparams(weight, grid), strict=True):
        codes = normalize(block, qparams).round_()
        assert codes.abs().max() <= grid.quant_max


@given(weight_and_grid())
@settings(max_examples=200, deadline=None)
def test_layout_is_a_partition(case):
    weight, grid = case
    blocks = split_weight(weight, grid)
    assert sum(block.numel() for block in blocks) == weight.numel()
    assert all(block.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() for block in blocks)
    assert torch.equal(join_weight([block.clone() for block in blocks], weight.shape, grid), weight)
    scales = sum(math.prod(block.shape) // block.shape[-2] for block in blocks)
    assert scales == math.prod(scale_shape(weight.shape, grid))


@given(weight_and_grid(), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_a_fault_is_never_masked(case, fault, where):
    weight, grid = case
    weight.view(-1)[where % weight.numel()] = fault
    assert fake_quantize(weight, grid).view(-1)[where % weight.numel()].isnan()


@given(weight_and_grid(fewest_bits=3, elements=st.floats(-4, 4, width=32)), st.integers(0, 2**62))
@settings(max_examples=150, deadline=None)
def test_stochastic_rounding_picks_a_neighbour(case, key):
    weight, grid = case
    rounded = fake_quantize(weight, grid, noise=uniform(weight.shape, key))
    error = split_weight(rounded - weight, grid)
    for err, qparams in zip(error, choose_weight_qparams(weight, grid), strict=True):
        assert (err.abs() <= (1.001 if grid.symmetric else 1.501) * qparams.scale + 1e-5).all()


@given(st.integers(0, 5000), st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**62), st.data())
@settings(max_examples=100, deadline=None)
def test_counter_noise_does_not_depend_on_the_slice(count, key, start, data):
    whole = uniform(count, key, start)
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    assert torch.equal(uniform(end - begin, key, start + begin), whole[begin:end])
    assert count == 0 or (whole.min() >= 0 and whole.max() < 1)
