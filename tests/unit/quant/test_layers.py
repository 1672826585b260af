"""Class swaps: what they change (the class), what they must not (everything else), and what they compute."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ds_compress.quant import layers
from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.grid import ActivationGrid, Granularity, TokenGranularity, WeightGrid
from ds_compress.quant.layers import InputQuantizer, WeightQuantizer
from ds_compress.quant.weights import fake_quantize


class Projection(nn.Linear):
    """A user's subclass that inherits forward."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)


class Doubled(nn.Linear):
    """A user's subclass with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


MODULES = {
    "linear": (lambda: nn.Linear(8, 6), (3, 5, 8)),
    "linear_no_bias": (lambda: nn.Linear(8, 6, bias=False), (8,)),
    "subclass": (lambda: Projection(8), (3, 8)),
    "conv1d": (lambda: Conv1D(6, 8), (3, 5, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (2, 4, 7, 9)),
    "conv2d_same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (2, 4, 7, 9)),
    "conv2d_valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid", groups=2), (4, 7, 9)),
    "conv2d_circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 9)),
    "conv2d_reflect": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (2, 4, 7, 9)),
    "embedding": (lambda: nn.Embedding(10, 6, padding_idx=0), None),
    "embedding_negative_padding": (lambda: nn.Embedding(10, 6, padding_idx=-2), None),
}


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    return make(), torch.randint(0, 10, (3, 4)) if shape is None else torch.randn(shape)


def quantize(module: nn.Module, bits: int = 8) -> nn.Module:
    axis = 1 if isinstance(module, Conv1D) else 0
    grid = WeightGrid(bits, narrow_range=True, granularity=Granularity.PER_CHANNEL, channel_axis=axis)
    layers.attach(module).weight_quantizer = WeightQuantizer(FakeQuantConfig(grid))
    if not isinstance(module, nn.Embedding):
        is_image = isinstance(module, nn.Conv2d)
        granularity = TokenGranularity.PER_SAMPLE if is_image else TokenGranularity.PER_TOKEN
        module.input_quantizer = InputQuantizer(ActivationGrid(8, True, True, granularity), enabled=True)
    return module


@pytest.mark.parametrize("name", MODULES)
def test_off_is_exactly_the_base_class(name):
    module, x = build(name)
    expected = module(x)
    layers.attach(module)
    assert torch.equal(module(x), expected)
    module.weight_quantizer = WeightQuantizer()
    if not isinstance(module, nn.Embedding):
        module.input_quantizer = InputQuantizer(ActivationGrid(8))
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("name", MODULES)
def test_weight_only_equals_the_base_class_on_the_quantized_weight(name):
    module, x = build(name)
    reference = copy.deepcopy(module)
    quantize(module, bits=4).input_quantizer = None
    reference.weight.data = layers.quantized_weight(module).detach()
    assert not torch.equal(reference.weight, module.weight)
    y, expected = module(x), reference(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(module.weight.grad, reference.weight.grad)


@pytest.mark.parametrize("name", MODULES)
def test_eight_bits_come_near(name):
    module, x = build(name)
    expected = module(x)
    y = quantize(module)(x)
    assert not torch.equal(y, expected)
    signal, noise = expected.square().mean(), (y - expected).square().mean()
    assert 10 * torch.log10(signal / noise) > 30  # dB


@pytest.mark.parametrize("name", MODULES)
def test_attach_and_detach_leave_everything_else_alone(name):
    module, x = build(name)
    module.eval()
    module.weight.requires_grad_(False)
    calls = []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.weight.ds_id = 17
    parameters, keys, base = dict(module.named_parameters()), list(module.state_dict()), type(module)
    quantize(module)
    module(x)

    def unchanged() -> bool:
        assert all(parameters[n] is p for n, p in module.named_parameters())
        assert list(module.state_dict()) == keys and len(list(module.modules())) == 1
        assert calls == ["forward"] and not module.training and not module.weight.requires_grad
        return module.weight.ds_id == 17 and isinstance(module, base)

    assert unchanged() and type(module) is not base
    module.weight_quantizer = module.input_quantizer = None
    layers.detach(module)
    assert unchanged() and type(module) is base
    assert not {"weight_quantizer", "input_quantizer"} & set(vars(module))


def test_detach_waits_for_both_quantizers():
    module = quantize(nn.Linear(4, 4))
    module.weight_quantizer = None
    layers.detach(module)
    assert type(module) is layers.QATLinear
    module.input_quantizer = None
    layers.detach(module)
    assert type(module) is nn.Linear


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", MODULES)
def test_copies_compute_the_same_and_are_independent(name, copier):
    module, x = build(name)
    y = quantize(module)(x)
    if copier == "deepcopy":
        other = copy.deepcopy(module)
    elif copier == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(module) and torch.equal(other(x), y)
    other.weight_quantizer.fake_quant = None
    assert torch.equal(module(x), y)


def test_ties_survive():
    embedding, head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
    head.weight = embedding.weight
    quantize(embedding)
    quantize(head)
    assert head.weight is embedding.weight
    head(embedding(torch.arange(4))).sum().backward()
    assert embedding.weight.grad is not None


@pytest.mark.parametrize("name", MODULES)
def test_attach_works_on_a_weight_that_is_empty_at_the_moment(name):
    module, x = build(name)
    expected = quantize(copy.deepcopy(module))(x)
    whole, module.weight.data = module.weight.data, torch.empty(0)
    quantize(module)
    module.weight.data = whole
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("name", MODULES)
def test_compiled_equals_eager(name):
    torch._dynamo.reset()
    module, x = build(name)
    quantize(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected, y = module(x), compiled(x)
    assert torch.equal(y, expected)
    wanted = torch.autograd.grad(expected.square().sum(), module.weight)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), module.weight), wanted)


def test_compiled_static_layer_observes():
    torch._dynamo.reset()
    module, x = build("linear")
    layers.attach(module).input_quantizer = static(enabled=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compiled(x)
    compiled(2 * x)
    assert torch.equal(module.input_quantizer.observed, torch.stack([-2 * x.min(), 2 * x.max()]))


@pytest.mark.parametrize(
    ("module", "error", "words"),
    [
        (nn.Embedding(4, 4, sparse=True), ValueError, "sparse=False"),
        (nn.Embedding(4, 4, max_norm=1.0), ValueError, "max_norm"),
        (nn.MultiheadAttention(8, 2).out_proj, TypeError, "MultiheadAttention"),
        (nn.BatchNorm1d(4), TypeError, "cannot be quantized"),
        (nn.ConvTranspose2d(4, 4, 2), TypeError, "cannot be quantized"),
        (Doubled(4, 4), TypeError, "cannot be quantized"),
    ],
)
def test_what_cannot_be_quantized_is_refused_untouched(module, error, words):
    base = type(module)
    with pytest.raises(error, match=words):
        layers.attach(module)
    assert type(module) is base


def test_learned_scale_refuses_frequency_scaling():
    with pytest.raises(ValueError, match="scale_grad_by_freq"):
        layers.check(nn.Embedding(4, 4, scale_grad_by_freq=True), learned=True)


def test_a_learned_step_size_is_the_only_new_key():
    module, x = build("linear")
    keys = list(module.state_dict())
    grid = WeightGrid(4, narrow_range=True, granularity=Granularity.PER_CHANNEL, learned=True)
    layers.attach(module).weight_quantizer = WeightQuantizer(FakeQuantConfig(grid))
    module.register_parameter(layers.STEP_SIZE, nn.Parameter(torch.full((6,), 0.1)))
    assert list(module.state_dict()) == [*keys, "weight_step_size"]
    module(x).sum().backward()
    assert module.weight_step_size.grad.abs().min() > 0
    assert torch.equal(
        layers.quantized_weight(module), fake_quantize(module.weight, grid, scale=torch.full((6,), 0.1))
    )


def static(**options) -> InputQuantizer:
    return InputQuantizer(ActivationGrid(8, True, True, TokenGranularity.PER_TENSOR, static=True), **options)


def test_static_input_passes_until_a_range_exists_and_eval_does_not_observe():
    module, x = build("linear")
    expected = module(x)
    layers.attach(module).input_quantizer = quantizer = static()
    module(x)
    assert quantizer.observed is None  # not enabled yet
    quantizer.enabled = True
    assert torch.equal(module(x), expected)
    assert torch.equal(quantizer.observed, torch.stack([-x.min(), x.max()]))
    module.eval()
    module(100 * x)
    assert torch.equal(quantizer.observed, torch.stack([-x.min(), x.max()]))
    quantizer.input_range = torch.tensor([-1.0, 1.0])
    assert not torch.equal(module(x), expected)


def test_observation_keeps_no_graph():
    module, x = build("linear")
    layers.attach(module).input_quantizer = quantizer = static(
        enabled=True, input_range=torch.tensor([-1.0, 1.0])
    )
    module(x.requires_grad_()).sum().backward()
    assert quantizer.observed.grad_fn is None and not quantizer.observed.requires_grad


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_a_fault_in_the_input_is_seen_in_the_output(fault):
    module, x = build("linear")
    x[1, 2, 3] = fault
    dynamic = quantize(copy.deepcopy(module))(x)
    assert dynamic[1, 2].isnan().all() and dynamic[0].isfinite().all()
    layers.attach(module).input_quantizer = static(enabled=True, input_range=torch.tensor([-1.0, 1.0]))
    assert module(x)[1, 2].isnan().all()


@pytest.mark.parametrize("name", MODULES)
def test_print_shows_how_a_layer_is_quantized(name):
    module, _ = build(name)
    plain = module.extra_repr()
    quantize(module, bits=4)
    shown = repr(module)
    assert shown.startswith("QAT") and plain in shown and "weight=int4 narrow per_channel" in shown
    assert isinstance(module, nn.Embedding) or "input=int8 narrow per_" in shown
    module.weight_quantizer = module.input_quantizer = None
    assert "weight=" not in repr(module) and "input=" not in repr(module)
    layers.detach(module)
    assert module.extra_repr() == plain


def test_print_shows_the_state_of_quantizers():
    module = layers.attach(nn.Linear(8, 4))
    module.weight_quantizer = WeightQuantizer()
    static = ActivationGrid(8, False, granularity=TokenGranularity.PER_TENSOR, static=True)
    module.input_quantizer = InputQuantizer(static)
    assert module.extra_repr().endswith("weight=off, input=uint8 per_tensor static, off")
    columns = WeightGrid(bits=2, granularity=Granularity.PER_COLUMN_GROUP, group_size=4)
    module.weight_quantizer.fake_quant = FakeQuantConfig(columns, blend_ratio=0.25)
    module.input_quantizer.enabled = True
    assert module.extra_repr().endswith(
        "weight=ternary per_column_group of 4, blend 25%, input=uint8 per_tensor static, no range yet"
    )
    module.weight_quantizer.fake_quant = FakeQuantConfig(WeightGrid(bits=3, groups=2, learned=True))
    module.input_quantizer.input_range = torch.tensor([-1.0, 1.0])
    assert module.extra_repr().endswith(
        "weight=int3 per_group of 2, learned scales, input=uint8 per_tensor static"
    )
