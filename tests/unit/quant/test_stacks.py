"""A stack of matrices is quantized as each of its matrices would be, in one pass for all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ds_compress.ops.reference.float_formats import E2M1, global_scale_of
from ds_compress.quant.fake_quant import FakeQuantConfig, fake_quantize_weight, weight_qparams
from ds_compress.quant.gradients import weight_backward
from ds_compress.quant.grid import Granularity, WeightGrid
from ds_compress.quant.layout import of_one_matrix, scale_shape
from ds_compress.quant.search import searched_scale
from ds_compress.quant.weights import dequantize, initial_scale, quantize

SHAPE = (3, 12, 32)
_SIZES = {"mxfp4": 32, "nvfp4": 16, "mxfp8": 32}


def _grids() -> list[WeightGrid]:
    integers = [
        WeightGrid(4, granularity=Granularity.PER_TENSOR),
        WeightGrid(4, granularity=Granularity.PER_GROUP, groups=6),
        WeightGrid(4, granularity=Granularity.PER_CHANNEL, narrow_range=True),
        WeightGrid(4, granularity=Granularity.PER_COLUMN_GROUP, group_size=8, symmetric=False),
        WeightGrid(4, granularity=Granularity.PER_COLUMN_GROUP, group_size=20),
        WeightGrid(2, granularity=Granularity.PER_CHANNEL),
        WeightGrid(1, granularity=Granularity.PER_TENSOR),
    ]
    floats = [
        WeightGrid(8, granularity=granularity, format="fp8_e4m3", group_size=8)
        for granularity in (Granularity.PER_TENSOR, Granularity.PER_CHANNEL, Granularity.PER_BLOCK)
    ]
    floats.append(WeightGrid(8, granularity=Granularity.PER_BLOCK, format="fp8_e4m3", group_size=4))
    for name, size in _SIZES.items():
        bits = 8 if name == "mxfp8" else 4
        floats.append(
            WeightGrid(bits, granularity=Granularity.PER_COLUMN_GROUP, format=name, group_size=size)
        )
    return integers + floats


GRIDS = _grids()


@pytest.fixture
def stack() -> torch.Tensor:
    made = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return made * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1)  # one scale for all would ruin two of them


def _transposed(stack: torch.Tensor, grid: WeightGrid) -> tuple[torch.Tensor, WeightGrid]:
    return stack.transpose(1, 2).contiguous(), replace(grid, channel_axis=1)


def _id(grid: WeightGrid) -> str:
    return grid.describe().replace(" ", "_")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=_id)
def test_a_stack_is_its_matrices(
    stack: torch.Tensor, grid: WeightGrid, transposed: bool, dtype: torch.dtype
) -> None:
    stack = stack.to(dtype)
    if transposed:
        stack, grid = _transposed(stack, grid)
    whole = FakeQuantConfig(replace(grid, stacked=True))
    one = FakeQuantConfig(grid)
    found = fake_quantize_weight(stack, whole).values
    expected = torch.stack([fake_quantize_weight(matrix, one).values for matrix in stack])
    assert torch.equal(found, expected)
    stored = quantize(stack, whole.grid)
    each = [quantize(matrix, grid) for matrix in stack]
    assert stored.scale.shape == scale_shape(stack.shape, whole.grid)
    assert torch.equal(stored.values, torch.stack([q.values for q in each]))
    assert torch.equal(stored.scale, torch.stack([q.scale for q in each]))
    assert torch.equal(dequantize(stored, dtype), found)

    grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found_grad, _ = weight_backward(grad, stack, whole, weight_qparams(stack, whole))
    expected_grad = torch.stack(
        [
            weight_backward(g, matrix, one, weight_qparams(matrix, one))[0]
            for g, matrix in zip(grad, stack, strict=True)
        ]
    )
    assert torch.equal(found_grad, expected_grad)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("grid", [g for g in GRIDS if g.symmetric and g.bits > 2], ids=_id)
def test_given_scales_of_a_stack(stack: torch.Tensor, grid: WeightGrid, transposed: bool) -> None:
    grid = replace(grid, learned=True)
    if transposed:
        stack, grid = _transposed(stack, grid)
    whole = replace(grid, stacked=True)
    start = searched_scale if grid.format != "int" else initial_scale
    scale = start(stack, whole)
    each = [start(matrix, grid) for matrix in stack]
    assert torch.equal(scale, torch.stack(each))
    global_scales: list[torch.Tensor | None] = [None] * len(stack)
    shared = None
    if grid.has_global_scale:
        shared = global_scale_of(stack.abs().amax((1, 2)), E2M1)
        global_scales = list(shared.split(1))
    config = FakeQuantConfig(whole, global_scale=shared)
    configs = [FakeQuantConfig(grid, global_scale=g) for g in global_scales]
    found = fake_quantize_weight(stack, config, scale).values
    expected = [fake_quantize_weight(m, c, s).values for m, c, s in zip(stack, configs, each, strict=True)]
    assert torch.equal(found, torch.stack(expected))
    grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(1))
    found_grads = weight_backward(grad, stack, config, weight_qparams(stack, config, scale), scale)
    expected_grads = [
        weight_backward(g, m, c, weight_qparams(m, c, s), s)
        for g, m, c, s in zip(grad, stack, configs, each, strict=True)
    ]
    for position in range(2):
        parts = [pair[position] for pair in expected_grads]
        assert torch.allclose(found_grads[position], torch.stack(parts), rtol=1e-6)  # type: ignore[arg-type]


def test_the_grid_of_one_matrix() -> None:
    grid = WeightGrid(8, granularity=Granularity.PER_CHANNEL, stacked=True)
    assert not of_one_matrix(grid).stacked
