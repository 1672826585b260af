"""One block: the rounding rule, and what a fixed range does with Inf and NaN."""

from __future__ import annotations

import math

import pytest
import torch

from ds_compress.quant.arithmetic import dequantize_, quantize_block, unclipped_interval
from ds_compress.quant.grid import ActivationGrid
from ds_compress.quant.qparams import qparams_from_range


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unclipped_interval_is_exactly_the_rounding_rule(bits, symmetric, narrow, dtype):
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
