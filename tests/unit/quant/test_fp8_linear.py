"""The product of FP8 codes against the float path: the same numbers, but for the rounding of sums."""

from __future__ import annotations

import pytest
import torch

from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.fake_quantized_linear import fake_quantized_linear
from ds_compress.quant.grid import ActivationGrid, Granularity, TokenGranularity, WeightGrid
from ds_compress.quant.linear_ops import DenseOp

WEIGHTS = [Granularity.PER_CHANNEL, Granularity.PER_TENSOR]
INPUTS = [
    (TokenGranularity.PER_TOKEN, False),
    (TokenGranularity.PER_TENSOR, False),
    (TokenGranularity.PER_TENSOR, True),
]


def grids(weights: Granularity, inputs: tuple[TokenGranularity, bool]) -> tuple[WeightGrid, ActivationGrid]:
    granularity, static = inputs
    return (
        WeightGrid(bits=8, format="fp8_e4m3", granularity=weights),
        ActivationGrid(bits=8, format="fp8_e4m3", granularity=granularity, static=static),
    )


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_float_path_but_for_the_rounding_of_sums(
    weights: Granularity, inputs: tuple[TokenGranularity, bool], dtype: torch.dtype
) -> None:
    weight_grid, input_grid = grids(weights, inputs)
    fixed = torch.tensor([-2.0, 2.5]) if input_grid.static else None
    results = []
    for kernel in ("float", "fp8"):
        torch.manual_seed(0)
        x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
        weight = torch.randn(32, 64).to(dtype).requires_grad_()
        bias = torch.randn(32).to(dtype).requires_grad_()
        fake_quant = FakeQuantConfig(weight_grid, kernel=kernel)
        y = fake_quantized_linear(x, weight, bias, DenseOp(), fake_quant, input_grid, None, fixed)
        y.float().square().sum().backward()
        assert y.dtype is dtype
        results.append((y, x.grad, weight.grad, bias.grad))
    for mine, other in zip(*results, strict=True):
        assert mine is not None and other is not None
        rounding = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(mine, other, rtol=rounding, atol=rounding * float(other.abs().max()))


def test_the_forward_multiplies_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    product = torch._scaled_mm

    def spy(x: torch.Tensor, weight: torch.Tensor, *rest: object, **kwargs: object) -> torch.Tensor:
        seen.append((x.dtype, weight.dtype))
        return product(x, weight, *rest, **kwargs)

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    weight_grid, input_grid = grids(*[Granularity.PER_CHANNEL], INPUTS[0])
    x, weight = torch.randn(4, 32), torch.randn(16, 32)
    fake_quantized_linear(x, weight, None, DenseOp(), FakeQuantConfig(weight_grid, kernel="fp8"), input_grid)
    assert seen == [(torch.float8_e4m3fn, torch.float8_e4m3fn)]


def test_a_fault_stays_visible() -> None:
    weight_grid, input_grid = grids(Granularity.PER_CHANNEL, INPUTS[0])
    x, weight = torch.randn(4, 32), torch.randn(16, 32)
    x[1, 3], weight[2, 2] = float("nan"), float("inf")
    y = fake_quantized_linear(
        x, weight, None, DenseOp(), FakeQuantConfig(weight_grid, kernel="fp8"), input_grid
    )
    assert y[1].isnan().all() and y[:, 2].isnan().all()
    assert y[0, 0].isfinite()
