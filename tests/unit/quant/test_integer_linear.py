"""`"kernel": "int8"`: forward multiplies the codes; backward is that of the float path, or integers, too."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ds_compress import ConfigError, plan
from ds_compress.quant import layers
from ds_compress.quant.fake_quant import FakeQuantConfig, fake_quantize_input
from ds_compress.quant.grid import ActivationGrid, Granularity, TokenGranularity, WeightGrid
from ds_compress.quant.weights import initial_scale, quantize

CHANNEL = {"granularity": Granularity.PER_CHANNEL, "narrow_range": True}
GRIDS = {
    "narrow, per channel": WeightGrid(8, **CHANNEL),
    "legacy, per tensor": WeightGrid(8),
    "legacy, groups of two rows": WeightGrid(8, groups=12),
    "4 bits": WeightGrid(4, **CHANNEL),
    "ternary": WeightGrid(2, granularity=Granularity.PER_CHANNEL),
    "binary": WeightGrid(1, granularity=Granularity.PER_TENSOR),
    "stochastic": WeightGrid(8, stochastic=True, **CHANNEL),
    "learned": WeightGrid(8, learned=True, **CHANNEL),
}
NARROW, LEGACY = ActivationGrid(8, narrow_range=True), ActivationGrid(8)


def layer(kind: str = "linear", bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        module: nn.Module = Conv1D(24, 37)
        nn.init.normal_(module.bias)
        return module
    return nn.Linear(37, 24, bias=bias)


def twins(
    grid: WeightGrid, input_grid: ActivationGrid, module: nn.Module, **extra: Any
) -> list[layers.QATModule]:
    """The same layer on the float path and on the integer path."""
    made = []
    for integer in (False, True):
        twin = layers.attach(copy.deepcopy(module))
        fake_quant = FakeQuantConfig(grid, noise_key=5, kernel="int8" if integer else "float", **extra)
        twin.weight_quantizer = layers.WeightQuantizer(fake_quant)
        twin.input_quantizer = layers.InputQuantizer(input_grid, enabled=True)
        if input_grid.static:
            twin.input_quantizer.input_range = torch.tensor([-2.0, 1.5])
        if grid.learned:
            twin.register_parameter(layers.STEP_SIZE, nn.Parameter(initial_scale(twin.weight, grid)))
        made.append(twin)
    return made


def gradients(module: layers.QATModule, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    module(x).backward(grad)
    return [x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("input_grid", [NARROW, LEGACY], ids=["narrow", "legacy"])
@pytest.mark.parametrize("name", GRIDS)
def test_it_differs_from_the_float_path_by_rounding_only(name: str, input_grid: ActivationGrid) -> None:
    floating, integer = twins(GRIDS[name], input_grid, layer())
    x = torch.randn(3, 5, 37)
    torch.testing.assert_close(integer(x), floating(x), rtol=1e-5, atol=1e-5)
    grad = torch.randn(3, 5, 24)
    for mine, theirs in zip(gradients(integer, x, grad), gradients(floating, x, grad), strict=True):
        assert torch.equal(mine, theirs)


def test_it_is_the_exact_sum_over_the_codes() -> None:
    module = twins(GRIDS["narrow, per channel"], NARROW, layer())[1]
    x = torch.randn(6, 37)
    codes = quantize(module.weight.detach(), GRIDS["narrow, per channel"])
    scale = fake_quantize_input(x, NARROW).qparams[0].scale
    x_codes = torch.round(x / scale).double()
    total = (x_codes @ codes.values.double().t()).float()
    expected = total * (scale * codes.scale) + module.bias
    assert torch.equal(module(x), expected)


def test_conv1d_and_layers_without_bias() -> None:
    x = torch.randn(4, 37)
    for module, grid in (
        (layer("conv1d"), replace(GRIDS["narrow, per channel"], channel_axis=1)),
        (layer(bias=False), GRIDS["narrow, per channel"]),
    ):
        floating, integer = twins(grid, NARROW, module)
        torch.testing.assert_close(integer(x), floating(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "input_grid",
    [
        ActivationGrid(8, static=True, granularity=TokenGranularity.PER_TENSOR),
        ActivationGrid(8, granularity=TokenGranularity.PER_TENSOR),
    ],
    ids=["static", "per tensor"],
)
def test_one_range_for_the_whole_input(input_grid: ActivationGrid) -> None:
    floating, integer = twins(GRIDS["narrow, per channel"], input_grid, layer())
    for twin in (floating, integer):
        twin.eval()
    x = torch.randn(7, 37) * 2
    torch.testing.assert_close(integer(x), floating(x), rtol=1e-5, atol=1e-5)
    grad = torch.randn(7, 24)
    for mine, theirs in zip(gradients(integer, x, grad), gradients(floating, x, grad), strict=True):
        assert torch.equal(mine, theirs)


def test_autocast_decides_the_dtype_of_the_result() -> None:
    floating, integer = twins(GRIDS["narrow, per channel"], NARROW, layer())
    x = torch.randn(4, 37)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = integer(x), floating(x)
    assert mine.dtype is theirs.dtype is torch.bfloat16
    torch.testing.assert_close(mine.float(), integer(x), rtol=2**-8, atol=1e-6)


class TestBackward:
    """`"backward": "int8"`: only the gradient of the input is another, by what rounding the gradient's rows changes."""

    @pytest.mark.parametrize("input_grid", [NARROW, LEGACY], ids=["narrow", "legacy"])
    @pytest.mark.parametrize("name", GRIDS)
    def test_the_input_s_gradient_is_that_of_rounded_rows(
        self, name: str, input_grid: ActivationGrid
    ) -> None:
        floating, exact = twins(GRIDS[name], input_grid, layer())
        rounded = twins(GRIDS[name], input_grid, layer(), backward="int8")[1]
        x, grad = torch.randn(3, 5, 37), torch.randn(3, 5, 24)
        mine, theirs = gradients(rounded, x, grad), gradients(exact, x, grad)
        for own, other in zip(mine[1:], theirs[1:], strict=True):
            assert torch.equal(own, other)
        difference = (mine[0] - theirs[0]).norm() / theirs[0].norm()
        assert 1e-4 < difference < 0.02
        assert torch.equal(gradients(floating, x, grad)[0], theirs[0])

    def test_it_is_the_exact_sum_over_the_codes(self) -> None:
        module = twins(GRIDS["narrow, per channel"], NARROW, layer(), backward="int8")[1]
        grad = torch.randn(6, 24) * 10.0 ** torch.arange(-3.0, 3.0).unsqueeze(1)
        codes = quantize(module.weight.detach(), GRIDS["narrow, per channel"])
        scaled = grad * codes.scale.reshape(-1)
        scale = scaled.abs().amax(1, keepdim=True) / 127
        total = (torch.round(scaled / scale).double() @ codes.values.double()).float()
        assert torch.equal(gradients(module, torch.randn(6, 37), grad)[0], total * scale)

    def test_conv1d_and_codes_that_are_rounded_before_they_are_packed(self) -> None:
        x, grad = torch.randn(4, 37), torch.randn(4, 24)
        grid = replace(GRIDS["narrow, per channel"], channel_axis=1)
        for chosen in (grid, replace(grid, bits=4)):
            exact = twins(chosen, NARROW, layer("conv1d"))[1]
            rounded = twins(chosen, NARROW, layer("conv1d"), backward="int8")[1]
            mine, theirs = gradients(rounded, x, grad), gradients(exact, x, grad)
            assert 1e-4 < (mine[0] - theirs[0]).norm() / theirs[0].norm() < 0.02
            assert torch.equal(mine[1], theirs[1])

    def test_clipped_inputs_get_no_gradient(self) -> None:
        static = ActivationGrid(8, static=True, granularity=TokenGranularity.PER_TENSOR)
        module = twins(GRIDS["narrow, per channel"], static, layer(), backward="int8")[1].eval()
        x = torch.full((2, 37), 0.5)
        x[:, 7] = 9.0  # the range ends at 1.5
        grad = gradients(module, x, torch.randn(2, 24))[0]
        assert bool((grad[:, 7] == 0).all()) and bool((grad[:, :7] != 0).all())

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_gradient_that_is_no_number_shows(self, bad: float) -> None:
        module = twins(GRIDS["narrow, per channel"], NARROW, layer(), backward="int8")[1]
        grad = torch.randn(3, 24)
        grad[1, 5], grad[2] = bad, 0.0
        found = gradients(module, torch.randn(3, 37), grad)[0]
        assert bool(found[0].isfinite().all()) and not bool(found[1].isfinite().any())
        assert bool((found[2] == 0).all())

    def test_under_autocast_it_has_the_dtype_of_the_input(self) -> None:
        exact = twins(GRIDS["narrow, per channel"], NARROW, layer())[1]
        rounded = twins(GRIDS["narrow, per channel"], NARROW, layer(), backward="int8")[1]
        x, grad = torch.randn(4, 37), torch.randn(4, 24).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            mine, theirs = gradients(rounded, x, grad)[0], gradients(exact, x, grad)[0]
        assert mine.dtype is theirs.dtype is torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0.1, atol=0.05)

    def test_a_blended_weight_takes_the_float_path(self) -> None:
        settings: dict[str, Any] = {"blend_ratio": 0.25}
        exact = twins(GRIDS["narrow, per channel"], NARROW, layer(), **settings)[1]
        other = twins(GRIDS["narrow, per channel"], NARROW, layer(), backward="int8", **settings)[1]
        x, grad = torch.randn(4, 37), torch.randn(4, 24)
        assert torch.equal(gradients(exact, x, grad)[0], gradients(other, x, grad)[0])


def test_a_blended_weight_has_no_codes_and_takes_the_float_path() -> None:
    floating, integer = twins(GRIDS["narrow, per channel"], NARROW, layer(), blend_ratio=0.25)
    x = torch.randn(4, 37)
    assert torch.equal(integer(x), floating(x))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_fault_in_a_row_is_seen_in_that_row_only(poison: float) -> None:
    module = twins(GRIDS["narrow, per channel"], NARROW, layer())[1]
    x = torch.randn(4, 37)
    clean = module(x)
    x[2, 11] = poison
    y = module(x)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_fault_in_a_weight_is_seen_in_its_channel(poison: float) -> None:
    module = twins(GRIDS["narrow, per channel"], NARROW, layer())[1]
    with torch.no_grad():
        module.weight[3, 1] = poison
    y = module(torch.randn(4, 37))
    assert y[:, 3].isnan().all()
    assert y[:, [i for i in range(24) if i != 3]].isfinite().all()


# --- the config --------------------------------------------------------------------------------------------


def block(weights: dict[str, Any], inputs: dict[str, Any] | None, bits: int = 8) -> dict[str, Any]:
    made: dict[str, Any] = {
        "weight_quantization": {
            "shared_parameters": {"enabled": True, "kernel": "int8", "granularity": "per_channel"} | weights,
            "different_groups": {"all": {"params": {"start_bits": 8, "target_bits": 8}}},
        }
    }
    if inputs is not None:
        made["activation_quantization"] = {
            "shared_parameters": {"enabled": True} | inputs,
            "different_groups": {"all": {"params": {"bits": bits}}},
        }
    return made


MODEL = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
WIDE = nn.Linear(1, 132_105, bias=False)
IMAGES = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(12, 8))


def test_the_plan_accepts_what_the_kernel_can_do() -> None:
    assert plan(MODEL, block({}, {})).techniques["weight_quantization"].shared.kernel == "int8"
    plan(MODEL, block({"granularity": None, "quantize_groups": 2}, {"range_calibration": "static"}))
    plan(MODEL, block({"backward": "int8"}, {}))
    plan(WIDE, block({}, {}))


@pytest.mark.parametrize(
    ("model", "config", "path", "says"),
    [
        (MODEL, block({}, None), "weight_quantization.shared_parameters.kernel", "activation_quantization"),
        (
            MODEL,
            block({"quantization_type": "asymmetric"}, {}),
            "weight_quantization.shared_parameters.quantization_type",
            "symmetric",
        ),
        (
            MODEL,
            block({}, {"quantization_type": "asymmetric"}),
            "activation_quantization.shared_parameters.quantization_type",
            "symmetric",
        ),
        (MODEL, block({}, {}, bits=4), "activation_quantization.different_groups.all.params.bits", "8"),
        (
            MODEL,
            block({"granularity": "per_column_group", "group_size": 4}, {}),
            "weight_quantization.shared_parameters.granularity",
            "per_channel",
        ),
        (
            MODEL,
            block({"granularity": None, "quantize_groups": 16}, {}),
            "weight_quantization.shared_parameters.quantize_groups",
            "cuts through",
        ),
        (
            MODEL,
            block({}, {"excluded_modules": ["^2$"]}),
            "weight_quantization.shared_parameters.kernel",
            "whose input is not quantized",
        ),
        (IMAGES, block({}, {}), "weight_quantization.shared_parameters.kernel", "Conv2d"),
        (
            MODEL,
            block({"kernel": "float", "backward": "int8"}, {}),
            "weight_quantization.shared_parameters.backward",
            'unless kernel is "int8"',
        ),
        (
            WIDE,
            block({"backward": "int8"}, {}),
            "weight_quantization.shared_parameters.backward",
            "of more than 132,104 outputs",
        ),
    ],
    ids=lambda value: value.split(".")[-1] if isinstance(value, str) else "",
)
def test_what_it_cannot_do_is_one_clear_error(
    model: nn.Module, config: dict[str, Any], path: str, says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        plan(model, config)
    assert f"compression_training.{path}" in str(error.value)
    assert says in str(error.value)
