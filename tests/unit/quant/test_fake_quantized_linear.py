"""Outputs and gradients against a naive composition with autograd, and what is kept for backward."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ds_compress.ops.counter_rng import uniform
from ds_compress.quant.embedding import fake_quantized_embedding
from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.fake_quantized_linear import WEIGHTS_PER_SAVED_SCALE, fake_quantized_linear
from ds_compress.quant.grid import ActivationGrid, Granularity, TokenGranularity, WeightGrid
from ds_compress.quant.layout import scale_shape
from ds_compress.quant.linear_ops import Conv1dOp, Conv2dOp, DenseOp
from ds_compress.quant.weights import fake_quantize, initial_scale

PER_CHANNEL = WeightGrid(8, narrow_range=True, granularity=Granularity.PER_CHANNEL)
LEGACY = WeightGrid(4, groups=2)
FAKE_QUANTS = [
    FakeQuantConfig(PER_CHANNEL),
    FakeQuantConfig(LEGACY),
    FakeQuantConfig(LEGACY, clipped_ste=False),
    FakeQuantConfig(LEGACY, blend_ratio=0.3),
    FakeQuantConfig(WeightGrid(3, symmetric=False)),
    FakeQuantConfig(WeightGrid(2)),
    FakeQuantConfig(WeightGrid(1)),
    FakeQuantConfig(replace(PER_CHANNEL, granularity=Granularity.PER_COLUMN_GROUP, group_size=4, bits=3)),
    FakeQuantConfig(WeightGrid(4, granularity=Granularity.PER_CHANNEL, stochastic=True), noise_key=5),
    None,
]
INPUTS = [
    ActivationGrid(8, narrow_range=True),
    ActivationGrid(4),
    ActivationGrid(4, symmetric=False),
    ActivationGrid(4, granularity=TokenGranularity.PER_TENSOR),
    ActivationGrid(4, granularity=TokenGranularity.PER_TENSOR, static=True),
    ActivationGrid(4, symmetric=False, granularity=TokenGranularity.PER_TENSOR, static=True),
    None,
]
RANGE = torch.tensor([-1.0, 1.5])


def naive_weight(weight: torch.Tensor, fake_quant: FakeQuantConfig | None) -> torch.Tensor:
    """Straight through by the usual detach trick: value of Q(w), gradient of w where w is kept."""
    if fake_quant is None:
        return weight
    noise = uniform(weight.shape, fake_quant.noise_key) if fake_quant.grid.stochastic else None
    quantized = fake_quantize(weight.detach(), fake_quant.grid, noise)
    kept = torch.ones_like(weight)
    if fake_quant.changes_gradient:
        for index in index_groups(weight, fake_quant.grid):
            flat = weight.detach().flatten()[index]
            steps = fake_quant.grid.scale_divisor
            if fake_quant.grid.symmetric:
                normalized = flat / (flat.abs().max() / steps)
            else:
                scale = (flat.max() - flat.min()) / steps
                normalized = (flat - torch.round(flat.min() / scale) * scale) / scale
            codes = normalized.round() if noise is None else (normalized + noise.flatten()[index]).floor()
            kept.view(-1)[index] = (
                (codes >= fake_quant.grid.quant_min) & (codes <= fake_quant.grid.quant_max)
            ).float()
    through = weight * kept
    mixed = through + (quantized - through).detach()
    return fake_quant.blend_ratio * weight + (1 - fake_quant.blend_ratio) * mixed


def index_groups(weight: torch.Tensor, grid: WeightGrid) -> list[torch.Tensor]:
    index = torch.arange(weight.numel()).view(weight.shape)
    if grid.granularity in (Granularity.PER_TENSOR, Granularity.PER_GROUP):
        return list(index.flatten().chunk(grid.groups))
    channels = list(index.movedim(grid.channel_axis, 0).flatten(1))
    if grid.granularity is Granularity.PER_CHANNEL:
        return channels
    return [part for channel in channels for part in channel.split(grid.group_size)]


def naive_input(x: torch.Tensor, grid: ActivationGrid | None) -> torch.Tensor:
    if grid is None:
        return x
    values = x.detach()
    if grid.static:
        low, high = RANGE
    elif grid.granularity is TokenGranularity.PER_TENSOR:
        low, high = values.min(), values.max()
    else:
        dims = (-1,) if grid.granularity is TokenGranularity.PER_TOKEN else tuple(range(1, x.dim()))
        low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    if grid.symmetric:
        scale, offset = torch.maximum(high, -low) / grid.scale_divisor, torch.zeros(())
    else:
        scale = (high - low) / grid.scale_divisor
        offset = torch.round(low / scale) * scale
    codes = ((values - offset) / scale).round()
    kept = ((codes >= grid.quant_min) & (codes <= grid.quant_max)).float()
    through = x * kept
    return through + (codes.clamp(grid.quant_min, grid.quant_max) * scale + offset - through).detach()


def compare(product, x, weight, bias, fake_quant, input_grid):
    operands = [t for t in (x, weight, bias) if t is not None]
    fixed = RANGE if input_grid is not None and input_grid.static else None
    y = fake_quantized_linear(x, weight, bias, product, fake_quant, input_grid, input_range=fixed)
    expected = product.forward(naive_input(x, input_grid), naive_weight(weight, fake_quant), bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, operands, upstream)
    wanted = torch.autograd.grad(expected, operands, upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("input_grid", INPUTS, ids=str)
@pytest.mark.parametrize("fake_quant", FAKE_QUANTS, ids=str)
def test_linear_equals_naive_composition(fake_quant, input_grid):
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 9, requires_grad=True), torch.randn(6, requires_grad=True)
    for shape in [(2, 5, 9), (4, 9), (9,)]:
        compare(DenseOp(), torch.randn(shape, requires_grad=True), weight, bias, fake_quant, input_grid)
    compare(DenseOp(), torch.randn(3, 9, requires_grad=True), weight, None, fake_quant, input_grid)


@pytest.mark.parametrize("input_grid", INPUTS[:3], ids=str)
@pytest.mark.parametrize("fake_quant", FAKE_QUANTS, ids=str)
def test_conv1d_equals_naive_composition(fake_quant, input_grid):
    torch.manual_seed(0)
    if fake_quant is not None:
        fake_quant = replace(fake_quant, grid=replace(fake_quant.grid, channel_axis=1))
    weight, bias = torch.randn(9, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    x = torch.randn(2, 5, 9, requires_grad=True)
    compare(Conv1dOp(), x, weight, bias, fake_quant, input_grid)


@pytest.mark.parametrize("input_grid", INPUTS[3:], ids=str)
@pytest.mark.parametrize("fake_quant", FAKE_QUANTS, ids=str)
@pytest.mark.parametrize(
    "product",
    [
        Conv2dOp((1, 1), (1, 0), (1, 1), 1),
        Conv2dOp((2, 1), (0, 2), (1, 2), 2),
        Conv2dOp((1, 1), (0, 0), (1, 1), 1, extra_padding=(0, 1, 1, 0)),
    ],
    ids=str,
)
def test_conv2d_equals_naive_composition(product, fake_quant, input_grid):
    torch.manual_seed(0)
    weight = torch.randn(6, 4 // product.groups, 3, 2, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    for shape in [(2, 4, 8, 9), (4, 8, 9)]:
        compare(product, torch.randn(shape, requires_grad=True), weight, bias, fake_quant, input_grid)


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize("fake_quant", FAKE_QUANTS[:-1], ids=str)
def test_embedding_equals_naive_composition(fake_quant, padding_idx, scale_grad_by_freq):
    torch.manual_seed(0)
    if fake_quant.grid.granularity is Granularity.PER_GROUP:
        for granularity in (Granularity.PER_CHANNEL, Granularity.PER_TENSOR):
            row_grid = replace(fake_quant.grid, granularity=granularity, groups=1)
            check_embedding(replace(fake_quant, grid=row_grid), padding_idx, scale_grad_by_freq)
    else:
        check_embedding(fake_quant, padding_idx, scale_grad_by_freq)


def check_embedding(fake_quant, padding_idx, scale_grad_by_freq):
    table = torch.randn(11, 9, requires_grad=True)
    indices = torch.tensor([[3, 0, 3], [10, 3, 7]])
    y = fake_quantized_embedding(indices, table, fake_quant, None, padding_idx, scale_grad_by_freq)
    expected = F.embedding(
        indices, naive_weight(table, fake_quant), padding_idx, scale_grad_by_freq=scale_grad_by_freq
    )
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, table, upstream), torch.autograd.grad(expected, table, upstream)
    )


def test_embedding_refuses_groups_across_rows():
    with pytest.raises(ValueError, match="per row"):
        fake_quantized_embedding(torch.tensor([0]), torch.randn(4, 4), FakeQuantConfig(LEGACY))


def lsq_value(weight: torch.Tensor, scale: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    """Esser et al. 2020, equations 1 to 3, with autograd: round passes its gradient on."""
    normalized = (weight / scale).clamp(grid.quant_min, grid.quant_max)
    return (normalized + (normalized.round() - normalized).detach()) * scale


@pytest.mark.parametrize("ratio", [1.0, 0.25])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_learned_step_size_gradient_is_the_papers(bits, narrow, ratio):
    torch.manual_seed(0)
    grid = WeightGrid(bits, narrow_range=narrow, granularity=Granularity.PER_CHANNEL, learned=True)
    weight = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    step = (torch.rand(5, dtype=torch.float64) / grid.quant_max + 0.02).requires_grad_()
    step.data[1] *= -1
    x = torch.randn(3, 8, dtype=torch.float64)
    fake_quant = FakeQuantConfig(grid, step_ratio=ratio)
    y = fake_quantized_linear(x, weight, None, DenseOp(), fake_quant, None, step)
    expected = F.linear(x, lsq_value(weight, step.abs()[:, None] * ratio, grid))
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, [weight, step], upstream)
    wanted_weight, wanted_step = torch.autograd.grad(expected, [weight, step], upstream)
    codes = (weight / (step.abs()[:, None] * ratio)).round()
    on_grid = (codes >= grid.quant_min) & (codes <= grid.quant_max)
    near_end = on_grid & ((weight / (step.abs()[:, None] * ratio)).abs() > grid.quant_max)
    torch.testing.assert_close(got[0][~near_end], wanted_weight[~near_end])
    # The paper masks by the value, torch (and we) by the code: rows with a value between differ.
    rows = ~near_end.any(1)
    assert rows.any()
    torch.testing.assert_close(got[1][rows], wanted_step[rows] / math.sqrt(8 * grid.quant_max))


def test_learned_step_size_gradient_is_the_derivative_where_codes_clip():
    """With every weight beyond the grid the loss is smooth in the step: finite differences apply."""
    grid = WeightGrid(3, narrow_range=True, granularity=Granularity.PER_TENSOR, learned=True)
    weight = torch.tensor([[4.0, -5.0], [6.0, 4.5]], dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64)

    def loss(step: torch.Tensor) -> torch.Tensor:
        return (
            fake_quantized_linear(x, weight, None, DenseOp(), FakeQuantConfig(grid), None, step)
            .square()
            .sum()
        )

    step = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    analytic = torch.autograd.grad(loss(step), step)[0] * math.sqrt(4 * grid.quant_max)
    with torch.no_grad():
        numeric = (loss(step + 1e-6) - loss(step - 1e-6)) / 2e-6
    torch.testing.assert_close(analytic.squeeze(), numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("granularity", ["per_channel", "per_column_group", "per_tensor"])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_learned_step_size_of_an_embedding_equals_that_of_its_rows(granularity, padding_idx):
    torch.manual_seed(0)
    grid = WeightGrid(4, narrow_range=True, granularity=Granularity(granularity), group_size=4, learned=True)
    table = torch.randn(6, 10, requires_grad=True)
    step = torch.nn.Parameter(initial_scale(table, grid))
    indices = torch.tensor([0, 2, 2, 5])
    upstream = torch.randn(4, 10)
    got = torch.autograd.grad(
        fake_quantized_embedding(indices, table, FakeQuantConfig(grid), step, padding_idx),
        [table, step],
        upstream,
    )
    # The same through the linear layer: rows picked by a one-hot product.
    picks = F.one_hot(indices, 6).float()
    if padding_idx is not None:
        picks = picks * (indices != padding_idx)[:, None]
    whole = fake_quantized_linear(torch.eye(10), table, None, DenseOp(), FakeQuantConfig(grid), None, step)
    wanted = torch.autograd.grad(picks @ whole.t(), [table, step], upstream)
    torch.testing.assert_close(got, wanted)
    assert got[1].shape == scale_shape(table.shape, grid)


def saved_by(build) -> list[torch.Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        build()
    return saved


@pytest.mark.parametrize("input_grid", INPUTS, ids=str)
@pytest.mark.parametrize("fake_quant", FAKE_QUANTS, ids=str)
def test_no_quantized_copy_is_kept(fake_quant, input_grid):
    weight, bias = torch.randn(64, 512, requires_grad=True), torch.zeros(64, requires_grad=True)
    x = torch.randn(32, 512, requires_grad=True)
    fixed = RANGE if input_grid is not None and input_grid.static else None
    saved = saved_by(
        lambda: fake_quantized_linear(x, weight, bias, DenseOp(), fake_quant, input_grid, input_range=fixed)
    )
    known = {t.untyped_storage().data_ptr() for t in (x, weight)}
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in known]
    assert len(saved) > len(extra) >= 0
    assert sum(t.numel() for t in extra) <= 2 * (x.numel() + weight.numel()) / WEIGHTS_PER_SAVED_SCALE


def test_no_quantized_rows_are_kept_by_an_embedding():
    table, indices = torch.randn(50, 64, requires_grad=True), torch.arange(40)
    saved = saved_by(lambda: fake_quantized_embedding(indices, table, FakeQuantConfig(PER_CHANNEL)))
    known = {t.untyped_storage().data_ptr() for t in (table, indices)}
    assert {t.untyped_storage().data_ptr() for t in saved} == known


def test_frozen_operands_are_neither_kept_nor_given_gradients():
    weight, x = torch.randn(8, 16), torch.randn(4, 16, requires_grad=True)
    fake_quant, narrow = FakeQuantConfig(PER_CHANNEL), ActivationGrid(8, narrow_range=True)

    def pointers(**operands):
        x, weight = operands["x"], operands["weight"]
        saved = saved_by(lambda: fake_quantized_linear(x, weight, None, DenseOp(), fake_quant, narrow))
        found = {t.untyped_storage().data_ptr() for t in saved}
        return x.untyped_storage().data_ptr() in found, weight.untyped_storage().data_ptr() in found

    assert pointers(x=x, weight=weight) == (False, True)
    assert pointers(x=x, weight=weight.clone().requires_grad_()) == (True, True)
    y = fake_quantized_linear(x, weight, None, DenseOp(), fake_quant, narrow)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, fake_quantize(weight, PER_CHANNEL).sum(0).expand(4, 16))
    trained = weight.clone().requires_grad_()
    y = fake_quantized_linear(x.detach(), trained, None, DenseOp(), fake_quant, narrow)
    y.sum().backward()
    torch.testing.assert_close(trained.grad, naive_input(x.detach(), narrow).sum(0).expand(8, 16))


def test_weight_may_be_released_between_forward_and_backward():
    """What ZeRO-3 does: the data of the parameter goes after forward and comes back before backward."""
    weight = torch.nn.Parameter(torch.randn(8, 16))
    x = torch.randn(4, 16, requires_grad=True)
    fake_quant = FakeQuantConfig(LEGACY)
    expected = torch.autograd.grad(
        fake_quantized_linear(x, weight, None, DenseOp(), fake_quant).square().sum(), [x, weight]
    )
    loss = fake_quantized_linear(x, weight, None, DenseOp(), fake_quant).square().sum()
    whole, weight.data = weight.data, torch.empty(0)
    weight.data = whole
    assert all(map(torch.equal, torch.autograd.grad(loss, [x, weight]), expected))


@pytest.mark.parametrize("fake_quant", FAKE_QUANTS, ids=str)
def test_bf16_autocast_computes_scales_in_fp32_and_products_in_bf16(fake_quant):
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 9, requires_grad=True), torch.randn(6, requires_grad=True)
    x = torch.randn(5, 9, requires_grad=True)
    input_grid = ActivationGrid(8, narrow_range=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = fake_quantized_linear(x, weight, bias, DenseOp(), fake_quant, input_grid)
        expected = F.linear(naive_input(x, input_grid), naive_weight(weight, fake_quant), bias)
    assert y.dtype is expected.dtype is torch.bfloat16
    assert torch.equal(y, expected)
    got = torch.autograd.grad(y.float().sum(), [x, weight, bias])
    wanted = torch.autograd.grad(expected.float().sum(), [x, weight, bias])
    assert [g.dtype for g in got] == [torch.float32] * 3
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-2, atol=2e-2)


def test_bf16_weights_are_quantized_in_fp32():
    weight = torch.randn(6, 9).bfloat16().requires_grad_()
    x = torch.eye(9).bfloat16()
    y = fake_quantized_linear(x, weight, None, DenseOp(), FakeQuantConfig(PER_CHANNEL))
    expected = fake_quantize(weight.detach().float(), PER_CHANNEL).bfloat16()
    assert torch.equal(y, expected.t())
    y.sum().backward()
    assert weight.grad is not None and weight.grad.dtype is torch.bfloat16


def test_stochastic_rounding_repeats_with_its_key_only():
    grid = WeightGrid(4, granularity=Granularity.PER_CHANNEL, stochastic=True)
    weight, x = torch.randn(6, 9), torch.eye(9)

    def draw(key):
        return fake_quantized_linear(x, weight, None, DenseOp(), FakeQuantConfig(grid, noise_key=key))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_embedding_draws_the_same_noise_as_the_whole_table():
    grid = WeightGrid(4, granularity=Granularity.PER_CHANNEL, stochastic=True)
    table, fake_quant = torch.randn(6, 9), FakeQuantConfig(grid, noise_key=3)
    whole = fake_quantized_linear(torch.eye(9), table, None, DenseOp(), fake_quant).t()
    assert torch.equal(fake_quantized_embedding(torch.tensor([4, 0, 4]), table, fake_quant), whole[[4, 0, 4]])


def test_second_derivatives_are_refused():
    weight = torch.randn(3, 4, requires_grad=True)
    y = fake_quantized_linear(torch.randn(2, 4), weight, None, DenseOp(), FakeQuantConfig(PER_CHANNEL))
    (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
