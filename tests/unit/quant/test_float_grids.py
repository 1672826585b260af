"""Grids of floats: one arithmetic by every path, gradients, given scales, embeddings, and faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager

from ds_compress.ops.reference.float_formats import ScaleKind
from ds_compress.quant import layers
from ds_compress.quant import weights as whole
from ds_compress.quant.embedding import fake_quantized_embedding
from ds_compress.quant.fake_quant import FakeQuantConfig, fake_quantize_input, fake_quantize_weight
from ds_compress.quant.fake_quantized_linear import fake_quantized_linear
from ds_compress.quant.formats import FORMATS, NF4, NumberFormat, nf4_codes, nf4_values
from ds_compress.quant.grid import ActivationGrid, Granularity, TokenGranularity, WeightGrid
from ds_compress.quant.linear_ops import DenseOp
from ds_compress.quant.quantizers import InputQuantizer, WeightQuantizer
from ds_compress.quant.search import largest_scale, searched_scale

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def grids_of(known: NumberFormat, axis: int = 0) -> list[WeightGrid]:
    common: dict[str, Any] = {"bits": known.bits, "format": known.name, "channel_axis": axis}
    if known.block is not None:
        return [WeightGrid(granularity=Granularity.PER_COLUMN_GROUP, group_size=known.block, **common)]
    free = (Granularity.PER_TENSOR, Granularity.PER_CHANNEL, Granularity.PER_BLOCK)
    return [WeightGrid(granularity=granularity, group_size=24, **common) for granularity in free]


def inputs_of(known: NumberFormat) -> list[ActivationGrid]:
    common: dict[str, Any] = {"bits": known.bits, "format": known.name}
    if known.block is not None:
        groups = TokenGranularity.PER_TOKEN_GROUP
        return [
            ActivationGrid(granularity=groups, group_size=known.block, static=static, **common)
            for static in ({False, known.has_global_scale})
        ]
    return [
        ActivationGrid(granularity=granularity, static=static, group_size=32, **common)
        for granularity, static in (
            (TokenGranularity.PER_TOKEN, False),
            (TokenGranularity.PER_TENSOR, False),
            (TokenGranularity.PER_TENSOR, True),
            (TokenGranularity.PER_TOKEN_GROUP, False),
        )
    ]


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values whose blocks differ by orders of magnitude, with whole blocks of zeros and single ones."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values = values * torch.randn((*shape[:-1], 1), generator=generator).mul(2).exp()
    values[0] = 0
    return values.masked_fill(torch.rand(shape, generator=generator) < 0.2, 0.0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("axis", [0, 1])
def test_every_path_gives_the_same_bits(name: str, axis: int) -> None:
    for grid in grids_of(FORMATS[name], axis):
        for dtype in DTYPES:
            weight = spread(64, 192).to(dtype)
            fused = fake_quantize_weight(weight, FakeQuantConfig(grid)).values
            passes = whole.fake_quantize(weight, grid)
            stored = whole.quantize(weight, grid)
            where = (grid, dtype)
            assert fused.dtype is dtype and torch.equal(fused, passes), where
            assert torch.equal(whole.dequantize(stored, dtype), passes), where
            assert stored.values.dtype is torch.uint8
            assert bool((fused[weight == 0] == 0).all()), where
            again = whole.fake_quantize(weight, grid, scale=stored.scale, global_scale=stored.global_scale)
            assert torch.equal(again, passes), where


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "nf4"])
def test_inputs_by_the_kernel_and_by_passes_are_equal(name: str) -> None:
    for grid in inputs_of(FORMATS[name]):
        x = spread(6, 5, 64)
        fixed = torch.tensor([-1.5, 2.0]) if grid.static else None
        one_pass = fake_quantize_input(x, grid, fixed)
        qparams = one_pass.qparams[0]
        again = fake_quantize_input(x, grid, fixed, qparams)
        assert torch.equal(one_pass.values, again.values), grid
        exact = fake_quantize_input(x.double(), grid, None if fixed is None else fixed.double())
        # Only a quotient that fp32 rounds across the middle of two numbers may differ.
        differs = (exact.values.float() - one_pass.values).abs() > 1e-5 * x.abs().amax()
        assert differs.float().mean() < 2e-3, grid


@pytest.mark.parametrize("name", FORMATS)
def test_a_fault_in_a_block_is_a_fault_of_the_block(name: str) -> None:
    for grid in grids_of(FORMATS[name]):
        for bad in (float("nan"), float("inf")):
            weight = spread(64, 192)
            weight[3, 5] = bad
            assert fake_quantize_weight(weight, FakeQuantConfig(grid)).values[3, 5].isnan(), grid


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "nf4"])
def test_the_gradient_is_straight_through_and_zero_where_a_value_saturates(name: str) -> None:
    known = FORMATS[name]
    assert known.number is not None
    grid = WeightGrid(bits=known.bits, format=name, granularity=Granularity.PER_CHANNEL, learned=True)
    scale = torch.tensor([2.0**-4, 2.0])
    step = known.number.largest / 4
    weight = torch.tensor([[0.3, -0.7, 1.0, 0.5]]).repeat(2, 1) * known.largest * scale[:, None]
    weight[:, 2] = 1.5 * known.largest * scale
    weight.requires_grad_()
    step_size = scale.clone().requires_grad_()
    shared = torch.ones(1) if known.has_global_scale else None
    y = fake_quantized_linear(
        torch.eye(4), weight, None, DenseOp(), FakeQuantConfig(grid, global_scale=shared), None, step_size
    )
    upstream = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    y.backward(upstream)
    assert weight.grad is not None and step_size.grad is not None and step > 0
    passes = torch.tensor([True, True, False, True])
    assert torch.equal(weight.grad, upstream.t() * passes)
    used = whole.learned_qparams(scale, weight.shape, grid, shared)[0].scale.view(2, 1)
    normalized = weight.detach() / used
    rounded = whole.fake_quantize(weight.detach(), grid, scale=scale, global_scale=shared) / used
    terms = (rounded - normalized * passes) * upstream.t()
    expected = terms.sum(1) / (4 * known.largest) ** 0.5
    torch.testing.assert_close(step_size.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8_e4m3", "nf4"])
def test_looked_up_rows_are_those_of_the_whole_table(name: str) -> None:
    known = FORMATS[name]
    for grid in grids_of(known):
        if grid.granularity is Granularity.PER_BLOCK:
            with pytest.raises(ValueError, match="an embedding is quantized"):
                fake_quantized_embedding(torch.tensor([1]), spread(8, 48), FakeQuantConfig(grid))
            continue
        table = spread(32, 192, seed=3).requires_grad_()
        indices = torch.tensor([[3, 7, 7], [31, 1, 3]])
        rows = fake_quantized_embedding(indices, table, FakeQuantConfig(grid))
        expected = F.embedding(indices, whole.fake_quantize(table.detach(), grid))
        assert torch.equal(rows, expected), grid
        rows.sum().backward()
        assert table.grad is not None and set(table.grad.nonzero()[:, 0].tolist()) == {1, 3, 7, 31}


@pytest.mark.parametrize("name", FORMATS)
def test_searched_scales_are_no_worse_than_the_largest_values(name: str) -> None:
    for grid in grids_of(FORMATS[name]):
        weight = spread(64, 192, seed=5)
        largest, searched = (find(weight, grid) for find in (largest_scale, searched_scale))
        shared = whole.own_global_scale(weight, grid)

        def error(scale: torch.Tensor) -> float:
            values = whole.fake_quantize(weight, grid, scale=scale, global_scale=shared)  # noqa: B023
            return float((values - weight).square().sum())  # noqa: B023

        assert error(searched) <= error(largest)
        assert torch.equal(
            whole.fake_quantize(weight, grid, scale=largest, global_scale=shared),
            whole.fake_quantize(weight, grid),
        )
    if name == "nvfp4":
        assert error(searched) < 0.95 * error(largest)


def test_nf4_has_the_nearest_of_its_numbers() -> None:
    values = torch.linspace(-1, 1, 4001)
    table = torch.tensor(NF4)
    nearest = table[(values[:, None] - table).abs().argmin(1)]
    ties = (values[:, None] - table).abs().sort(1).values[:, :2].diff(dim=1)[:, 0] < 1e-6
    assert torch.equal(nf4_values(nf4_codes(values))[~ties], nearest[~ties])
    assert len(nf4_codes(values).unique()) == 16


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_on_the_grid() -> None:
    grid = WeightGrid(
        bits=4, format="mxfp4", granularity=Granularity.PER_COLUMN_GROUP, group_size=32, stochastic=True
    )
    weight = torch.linspace(-6, 6, 32).repeat(4000, 1)
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2))
    mean = whole.fake_quantize(weight, grid, noise).mean(0)
    torch.testing.assert_close(mean, weight[0], rtol=0, atol=0.05)
    exact = torch.tensor([0.0, 0.5, -1.0, 1.5, 2.0, -3.0, 4.0, 6.0]).repeat(1, 4)
    assert torch.equal(whole.fake_quantize(exact, grid, noise[:1]), exact)


def test_what_a_grid_cannot_be() -> None:
    with pytest.raises(ValueError, match="nvfp4 has 4 bits"):
        WeightGrid(bits=8, format="nvfp4")
    with pytest.raises(ValueError, match="symmetric"):
        ActivationGrid(bits=8, format="fp8_e4m3", symmetric=False)
    assert FORMATS["nvfp4"].scale is ScaleKind.E4M3 and FORMATS["nvfp4"].scale_bits == 8


@pytest.mark.parametrize("name", ["fp8_e4m3", "mxfp4", "mxfp6_e2m3", "nvfp4", "nf4"])
@pytest.mark.parametrize("reads", ["weight", "both"])
def test_compiled_equals_eager_and_a_new_global_scale_needs_no_new_graph(name: str, reads: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    known = FORMATS[name]
    layer = torch.nn.Linear(64, 32)
    quantizer = layers.attach(layer)
    grid = grids_of(known)[-1 if known.block else 1]
    quantizer.weight_quantizer = WeightQuantizer()
    if reads == "both" and name != "nf4":
        inputs = inputs_of(known)[-1]
        quantizer.input_quantizer = InputQuantizer(inputs, enabled=True)
        quantizer.input_quantizer.input_range = torch.tensor([-2.0, 2.0])
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(layer, backend=counting, fullgraph=True)
    for scale in (700.0, 900.0, 1100.0):
        shared = torch.tensor([scale]) if known.has_global_scale else None
        quantizer.weight_quantizer.fake_quant = FakeQuantConfig(grid, global_scale=shared)
        x = torch.randn(6, 64, requires_grad=True)
        expected, y = layer(x), compiled(x)
        assert torch.equal(y, expected)
        wanted = torch.autograd.grad(expected.square().sum(), (x, layer.weight))
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (x, layer.weight)), wanted)
    assert len(graphs) == 1
