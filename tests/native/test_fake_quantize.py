"""Fused fake quantization: native against reference, against `quant.grid`, and against numpy, row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_compress.ops.reference import fake_quantize as reference
from ds_compress.quant.arithmetic import clamp_to_dtype, dequantize_, normalize
from ds_compress.quant.grid import ActivationGrid, Grid
from ds_compress.quant.qparams import QParams, choose_qparams, qparams_from_range
from tests.native.elementwise import (
    FLOATS,
    Fakes,
    native_ops,
    random_values,
    same,
)

GRIDS = [
    Grid(bits, symmetric, narrow)
    for bits in range(3, 9)
    for symmetric, narrow in ((True, False), (True, True), (False, False), (False, True))
]
shapes = st.tuples(st.integers(0, 20), st.integers(0, 90))
seeds = st.integers(0, 2**31)


def arguments_of(grid: Grid) -> dict[str, Any]:
    return {
        "quant_min": grid.quant_min,
        "quant_max": grid.quant_max,
        "steps": grid.scale_divisor,
        "symmetric": grid.symmetric,
    }


def hard_rows(rows: int, columns: int, dtype: torch.dtype, seed: int, specials: float = 0.05) -> torch.Tensor:
    """Rows of very different size; some constant, zero, subnormal, up to the largest float of the dtype or with a value
    that is not finite. The data begins at any address."""
    generator = torch.Generator().manual_seed(seed)
    x = random_values(rows * columns + 3, torch.float32, seed, specials)[3:].view(rows, columns)
    sizes = torch.tensor([1.0, 1e-3, 300.0, 1e-30, 1e-41, 0.0, 3e37])
    x = x * sizes[torch.randint(len(sizes), (rows, 1), generator=generator)]
    constant = torch.rand(rows, 1, generator=generator) < 0.15
    x = torch.where(constant, torch.full_like(x, -2.75), x).to(dtype)
    return torch.where(torch.rand(rows, 1, generator=generator) < 0.15, at_the_end_of_the_range(x), x)


def at_the_end_of_the_range(x: torch.Tensor) -> torch.Tensor:
    """Rows stretched until their largest magnitude is the largest of the dtype; what is not finite stays."""
    if not x.numel():
        return x
    wide = x.double()
    magnitudes = torch.where(wide.isfinite(), wide.abs(), 0.0)
    return (wide / magnitudes.amax(1, keepdim=True).clamp_min(1e-300) * torch.finfo(x.dtype).max).to(x.dtype)


def by_the_grid(
    x: torch.Tensor, grid: Grid, qparams: QParams | None = None
) -> tuple[torch.Tensor, QParams, torch.Tensor]:
    """y, ranges and kept of `quant.grid`."""
    exact = x.float()
    qparams = qparams or choose_qparams(exact, (1,), grid)
    normalized = normalize(exact, qparams)
    rounded = normalized.round()
    kept = (rounded >= grid.quant_min) & (rounded <= grid.quant_max)
    codes = normalized.round().clamp(grid.quant_min, grid.quant_max)
    return clamp_to_dtype(dequantize_(codes, qparams), x.dtype).to(x.dtype), qparams, kept


def equal_results(ops: Any, x: torch.Tensor, *qparams: torch.Tensor | None, **arguments: Any) -> bool:
    mine = ops.fake_quantize(x, *qparams, **arguments)
    theirs = reference.fake_quantize(x, *qparams, **arguments)
    return all(same(a, b) for a, b in zip(mine, theirs, strict=True))


# --- ranges measured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.bits}-{g.symmetric}-{g.narrow_range}")
def test_measured_ranges_give_what_the_grid_gives(grid: Grid, dtype: torch.dtype) -> None:
    for rows, columns, seed in ((40, 64, 1), (33, 51, 2), (1, 1000, 3), (64, 1, 4), (5, 0, 5), (0, 5, 6)):
        x = hard_rows(rows, columns, dtype, seed)
        y, qparams, kept = by_the_grid(x, grid)
        for ops in (native_ops(), reference):
            mine, scale, offset, bits = ops.fake_quantize(x, **arguments_of(grid), with_mask=True)
            assert same(mine, y)
            # Where the grid's own scale is Inf, everything is NaN; ours says so already in the scale.
            finite = qparams.scale.isfinite().view(-1)
            assert same(scale[finite], qparams.scale.view(-1)[finite]) and scale[~finite].isnan().all()
            if qparams.offset is None:
                assert offset.shape == (0,)
            else:
                assert torch.equal(offset[finite], qparams.offset.view(-1)[finite])
            row_is_finite = finite[:, None].expand(x.shape).reshape(-1)
            unpacked = np.unpackbits(bits.numpy(), bitorder="little")[: x.numel()].astype(bool)
            assert torch.equal(torch.from_numpy(unpacked) & row_is_finite, kept.view(-1) & row_is_finite)


@given(
    shape=shapes,
    seed=seeds,
    grid=st.sampled_from(GRIDS),
    dtype=st.sampled_from(FLOATS),
    keep=st.booleans(),
)
def test_measured_ranges(
    shape: tuple[int, int], seed: int, grid: Grid, dtype: torch.dtype, keep: bool
) -> None:
    x = hard_rows(*shape, dtype, seed)
    assert equal_results(native_ops(), x, **arguments_of(grid), with_mask=keep)


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("columns", (32768, 32769, 100001, 65543))
def test_long_rows_are_cut_into_pieces(columns: int, symmetric: bool) -> None:
    grid = Grid(8, symmetric)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for seed, rows in ((1, 3), (2, 1)):
                x = random_values(rows * columns, torch.float32, seed).view(rows, columns)
                x[0, columns - 1] = 7.0
                if rows > 1:
                    x[1, columns - 2] = math.nan
                assert equal_results(native_ops(), x, **arguments_of(grid), with_mask=True)
        finally:
            torch.set_num_threads(1)


def test_a_bad_value_spoils_its_row_and_no_other() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for grid in (Grid(8, True, True), Grid(8, False)):
            x = random_values(3 * 40, torch.float32, 1).view(3, 40)
            x[1, 7] = bad
            y, scale, _, bits = native_ops().fake_quantize(x, **arguments_of(grid), with_mask=True)
            assert y[1].isnan().all() and scale[1].isnan()
            assert y[[0, 2]].isfinite().all() and scale[[0, 2]].isfinite().all()
            assert not np.unpackbits(bits.numpy(), bitorder="little")[40:80].any()


def test_the_formula_written_again_in_numpy() -> None:
    x = hard_rows(30, 37, torch.float32, 11, specials=0.0)
    y, scale, _, _ = native_ops().fake_quantize(
        x, quant_min=-7, quant_max=7, steps=7, symmetric=True, with_mask=False
    )
    for row, mine, step in zip(x.numpy(), y.numpy(), scale.numpy(), strict=True):
        wanted = np.maximum(np.abs(row).max() / np.float32(7), np.float32(2.0**-126))
        assert wanted == step
        assert np.array_equal(mine, np.clip(np.rint(row / wanted), -7, 7) * wanted)


# --- ranges given ------------------------------------------------------------------------------------------------


@given(
    shape=shapes, seed=seeds, grid=st.sampled_from(GRIDS), dtype=st.sampled_from(FLOATS), shared=st.booleans()
)
def test_given_ranges(
    shape: tuple[int, int], seed: int, grid: Grid, dtype: torch.dtype, shared: bool
) -> None:
    x = hard_rows(*shape, dtype, seed)
    count = 1 if shared else shape[0]
    scale = random_values(count, torch.float32, seed + 1).abs() * 0.01 + 1e-4
    offset = None if grid.symmetric else random_values(count, torch.float32, seed + 2)
    assert equal_results(native_ops(), x, scale, offset, **arguments_of(grid), with_mask=True)


@pytest.mark.parametrize("grid", [ActivationGrid(8, static=True), ActivationGrid(8, False, static=True)])
def test_a_static_grid_saturates_and_a_nan_stays_alone(grid: ActivationGrid) -> None:
    x = hard_rows(20, 33, torch.float32, 9, specials=0.2)
    qparams = qparams_from_range(torch.tensor(-1.5), torch.tensor(2.0), grid)
    y, _, kept = by_the_grid(x, grid, qparams)
    scale = qparams.scale.view(1)
    offset = None if qparams.offset is None else qparams.offset.view(1)
    mine, used, _, bits = native_ops().fake_quantize(x, scale, offset, **arguments_of(grid), with_mask=True)
    assert same(mine, y) and same(used, scale)
    assert torch.equal(mine.isnan(), x.isnan())
    unpacked = np.unpackbits(bits.numpy(), bitorder="little")[: x.numel()].astype(bool)
    assert torch.equal(torch.from_numpy(unpacked), kept.view(-1))
    for row_scale in (scale, scale.expand(33).contiguous()):
        long = random_values(33 * 40000, torch.float32, 4).view(33, 40000)
        row_offset = None if offset is None else offset.expand(row_scale.shape).contiguous()
        assert equal_results(native_ops(), long, row_scale, row_offset, **arguments_of(grid), with_mask=False)


# --- refusals ----------------------------------------------------------------------------------------------------

ONE = torch.ones(1)
BAD_CALLS: dict[str, tuple[torch.Tensor, list[torch.Tensor | None], dict[str, Any]]] = {
    "x is float32": (torch.ones(2, 3, dtype=torch.float64), [], {}),
    "contiguous matrix": (torch.ones(3, 2).t(), [], {}),
    "got -129": (torch.ones(2, 3), [], {"quant_min": -129}),
    "steps >= 1": (torch.ones(2, 3), [], {"steps": 0}),
    r"scale is \(2,\) or \(1,\)": (torch.ones(2, 3), [torch.ones(3)], {}),
    "scale is contiguous float32": (torch.ones(2, 3), [ONE.double()], {}),
    "offset belongs": (torch.ones(2, 3), [ONE, ONE], {}),
    "needs its offset": (torch.ones(2, 3), [ONE], {"symmetric": False}),
    "same length": (torch.ones(2, 3), [ONE, torch.ones(2)], {"symmetric": False}),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_wrong_arguments_are_refused_alike(message: str) -> None:
    x, qparams, changed = BAD_CALLS[message]
    arguments = {
        "quant_min": -127,
        "quant_max": 127,
        "steps": 127,
        "symmetric": True,
        "with_mask": False,
    } | changed
    for ops in (native_ops(), reference, Fakes()):
        with pytest.raises(ValueError, match=message):
            ops.fake_quantize(x, *qparams, **arguments)
