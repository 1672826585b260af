"""Forward numerics against the formulas of the removed library, written out plainly; and its autograd functions."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_compress.compat import compression_scheduler, init_compression
from ds_compress.compat.basic_layer import QuantAct
from ds_compress.compat.utils import (
    AsymQuantizer,
    BinaryQuantizer,
    SymQuantizer,
    TernaryQuantizer,
    TopKBinarizer,
)
from ds_compress.engine.registry import run_of
from tests.legacy_blocks import CHANNELS, HEADS, ConvNet, row_pruning
from tests.models import tiny_bert

# -- the formulas ------------------------------------------------------------------------------------------------


def symmetric(x: torch.Tensor, bits: int, groups: int = 1, fixed: Any = None) -> torch.Tensor:
    flat = x.reshape(groups, -1)
    largest = flat.abs().amax(1, keepdim=True) if fixed is None else max(abs(fixed[0]), fixed[1])
    scale = 2 * largest / 2**bits
    codes = torch.clamp(torch.round(flat / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale).reshape(x.shape)


def asymmetric(x: torch.Tensor, bits: int, groups: int = 1, fixed: Any = None) -> torch.Tensor:
    flat = x.reshape(groups, -1)
    low, high = (flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)) if fixed is None else fixed
    scale = (high - low) / 2**bits
    zero = torch.round(torch.as_tensor(low / scale)) * scale
    codes = torch.clamp(torch.round((flat - zero) / scale), 0, 2**bits - 1)
    return (codes * scale + zero).reshape(x.shape)


def ternary(x: torch.Tensor, bits: int = 2, groups: int = 1) -> torch.Tensor:
    rows = []
    for row in x.reshape(groups, -1):
        beyond = row.abs() > 0.7 * row.abs().mean()
        rows.append(torch.where(beyond, row[beyond].abs().mean() * row.sign(), 0.0))
    return torch.stack(rows).reshape(x.shape)


def binary(x: torch.Tensor, bits: int = 1, groups: int = 1) -> torch.Tensor:
    flat = x.reshape(groups, -1)
    return (flat.sign() * flat.abs().mean(1, keepdim=True)).reshape(x.shape)


def largest(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    order = scores.flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros(scores.numel())
    mask[order[: math.ceil(ratio * scores.numel())]] = 1
    return mask.view(scores.shape)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- the functions -----------------------------------------------------------------------------------------------

FUNCTIONS = {
    "symmetric": (SymQuantizer, symmetric, (2, 4, 8, 12)),
    "asymmetric": (AsymQuantizer, asymmetric, (2, 4, 8, 12)),
    "ternary": (TernaryQuantizer, ternary, (2,)),
    "binary": (BinaryQuantizer, binary, (1,)),
}


@pytest.mark.parametrize("groups", [1, 4, 24])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_quantizers(name: str, groups: int) -> None:
    function, formula, every_bits = FUNCTIONS[name]
    for bits in every_bits:
        x = numbers(4, 6, 5).requires_grad_()
        y = function.apply(x, bits, None, None, groups)
        torch.testing.assert_close(y, formula(x.detach(), bits, groups), rtol=1e-6, atol=1e-7)
        y.backward(grad := numbers(4, 6, 5, seed=1))
        assert torch.equal(x.grad, grad)  # straight through, also where values clip


@pytest.mark.parametrize("fixed", [(-0.7, 1.3), (-2.0, 0.5), (0.2, 0.9)])
@pytest.mark.parametrize("name", ["symmetric", "asymmetric"])
def test_quantizers_on_a_fixed_range(name: str, fixed: tuple[float, float]) -> None:
    function, formula, _ = FUNCTIONS[name]
    low, high = torch.tensor(fixed)
    x = numbers(5, 7)
    expected = formula(x, 8, 1, fixed=(low, high))
    torch.testing.assert_close(function.apply(x, 8, low, high), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="neither"):
        function.apply(x, 8, low, high, 5)
    with pytest.raises(ValueError, match="both"):
        function.apply(x, 8, low)


def test_ternary_and_binary_take_no_range_and_groups_must_divide() -> None:
    x = numbers(3, 3)
    for function in (TernaryQuantizer, BinaryQuantizer):
        with pytest.raises(ValueError, match="no range"):
            function.apply(x, 2, x.min(), x.max())
    with pytest.raises(ValueError, match="2 groups do not divide 9"):
        SymQuantizer.apply(x, 8, None, None, 2)


def test_the_dtype_stays_and_arithmetic_is_fp32() -> None:
    x = numbers(64).to(torch.bfloat16)
    assert torch.equal(SymQuantizer.apply(x, 8), symmetric(x.float(), 8).to(torch.bfloat16))


def test_top_k() -> None:
    scores = numbers(6, 7).requires_grad_()
    mask = TopKBinarizer.apply(scores, 0.3, False)
    assert torch.equal(mask, largest(scores.detach(), 0.3))
    mask.backward(grad := numbers(6, 7, seed=1))
    assert torch.equal(scores.grad, grad)
    threshold = torch.tensor([0.4], requires_grad=True)
    mask = TopKBinarizer.apply(scores, threshold, True)
    assert torch.equal(mask, largest(scores.detach(), float(torch.sigmoid(torch.tensor(0.4)))))
    mask.backward(grad)
    torch.testing.assert_close(threshold.grad, (grad * mask).sum().view(1))


def test_quant_act_is_an_average_of_extremes() -> None:
    layer = QuantAct(quant_mode="asymmetric")
    low = high = 0.0
    for step in range(4):
        x = numbers(8, 8, seed=step)
        got = layer(x, 8)
        if step == 0:
            low, high = x.min(), x.max()
        low, high = 0.95 * low + 0.05 * x.min(), 0.95 * high + 0.05 * x.max()
        torch.testing.assert_close(layer.x_min_max, torch.stack([low, high]))
        torch.testing.assert_close(got, asymmetric(x, 8, fixed=(low, high)), rtol=1e-5, atol=1e-5)
    layer.eval()(numbers(3) * 100, 8)
    torch.testing.assert_close(layer.x_min_max, torch.stack([low, high]))


# -- the layers --------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 6)
        self.linear = nn.Linear(6, 8)
        self.conv = nn.Conv2d(2, 4, 3)


def prepared(technique: str, shared: dict[str, Any], params: dict[str, Any], modules: list[str]) -> Any:
    block = {
        technique: {
            "shared_parameters": {"enabled": True, "schedule_offset": 0, **shared},
            "different_groups": {"g": {"params": params, "modules": modules}},
        }
    }
    return init_compression(Layers(), {"compression_training": block})


def weights_of(bits: int, kind: str, groups: int, in_forward: bool = True) -> Any:
    shared = {
        "quantize_weight_in_forward": in_forward,
        "quantization_type": kind,
        "quantize_groups": groups,
    }
    params = {"start_bits": bits, "target_bits": bits}
    return prepared("weight_quantization", shared, params, ["linear", "conv", "table"])


@pytest.mark.parametrize("in_forward", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    ("bits", "kind", "formula"),
    [
        (8, "symmetric", symmetric),
        (4, "symmetric", symmetric),
        (3, "asymmetric", asymmetric),
        (8, "asymmetric", asymmetric),
        (2, "symmetric", ternary),
        (1, "symmetric", binary),
    ],
)
def test_weights(bits: int, kind: str, formula: Any, groups: int, in_forward: bool) -> None:
    model, plain = weights_of(bits, kind, groups, in_forward), Layers()
    x, pictures, ids = numbers(3, 6), numbers(2, 2, 5, 5), torch.tensor([[1, 3, 9]])
    weight = formula(plain.linear.weight.detach(), bits, groups)
    torch.testing.assert_close(model.linear(x), F.linear(x, weight, plain.linear.bias), rtol=1e-5, atol=1e-6)
    weight = formula(plain.conv.weight.detach(), bits, groups)
    expected = F.conv2d(pictures, weight, plain.conv.bias)
    torch.testing.assert_close(model.conv(pictures), expected, rtol=1e-5, atol=1e-6)
    table = formula(plain.table.weight.detach(), bits, 10)  # a scale for each row, whatever quantize_groups
    torch.testing.assert_close(model.table(ids), F.embedding(ids, table), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("kind", "formula"), [("symmetric", symmetric), ("asymmetric", asymmetric)])
def test_activations_dynamic(kind: str, formula: Any, bits: int) -> None:
    shared = {"quantization_type": kind, "range_calibration": "dynamic"}
    model = prepared("activation_quantization", shared, {"bits": bits}, ["linear", "conv"])
    plain = Layers()
    x, pictures = numbers(2, 3, 6), numbers(2, 2, 5, 5)
    per_token = formula(x, bits, 6)
    torch.testing.assert_close(model.linear(x), plain.linear(per_token), rtol=1e-5, atol=1e-6)
    per_image = formula(pictures, bits, 2)
    torch.testing.assert_close(model.conv(pictures), plain.conv(per_image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "formula"), [("symmetric", symmetric), ("asymmetric", asymmetric)])
def test_activations_static(kind: str, formula: Any) -> None:
    """The range is the average with momentum 0.95 of what each step has seen; what it says is the formula."""
    shared = {"quantization_type": kind, "range_calibration": "static"}
    model = prepared("activation_quantization", shared, {"bits": 8}, ["linear"]).train()
    config = run_of(model).block
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = compression_scheduler(model, config)
    low = high = None
    for step in range(3):
        x = numbers(4, 6, seed=step)
        model.linear(x).sum().backward()
        optimizer.step()
        scheduler.step()
        low = x.min() if low is None else 0.95 * low + 0.05 * x.min()
        high = x.max() if high is None else 0.95 * high + 0.05 * x.max()
    x = numbers(4, 6, seed=9)
    expected = Layers().linear(formula(x, 8, fixed=(low, high)))
    torch.testing.assert_close(model.eval().linear(x), expected, rtol=1e-5, atol=1e-5)


def masked_after_one_step(model: nn.Module, config: Any, loss: Any) -> None:
    """With a learning rate of 0: nothing changes but what masks change."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = compression_scheduler(model, config)
    loss(model).backward()
    optimizer.step()
    scheduler.step()


@pytest.mark.parametrize("ratio", [0.5, 0.3, 0.07])
def test_single_weights_l1(ratio: float) -> None:
    model = prepared("sparse_pruning", {"method": "l1"}, {"dense_ratio": ratio}, ["linear"])
    masked_after_one_step(model, run_of(model).block, lambda m: m.linear(numbers(2, 6)).sum())
    weight = Layers().linear.weight.detach()
    assert torch.equal(model.linear.weight, weight * largest(weight.abs(), ratio))


def test_learned_scores_start_as_kaiming_does() -> None:
    """Uniform in +-1 / sqrt(fan in), which is kaiming_uniform_ with a = sqrt(5), and the largest are kept."""
    model = prepared("sparse_pruning", {"method": "topk"}, {"dense_ratio": 0.25}, ["linear"])
    masked_after_one_step(model, run_of(model).block, lambda m: m.linear(numbers(2, 6)).sum())
    scores = run_of(model).techniques["sparse_pruning"].score.tensors["linear.weight"].view(8, 6)
    assert float(scores.abs().max()) <= 6**-0.5 and float(scores.abs().max()) > 0.8 * 6**-0.5
    assert torch.equal(model.linear.weight != 0, largest(scores, 0.25).bool())


@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_rows_l1(ratio: float) -> None:
    block = copy.deepcopy(row_pruning("l1"))["row_pruning"]
    block["shared_parameters"] |= {"schedule_offset": 0, "round_to": 1}
    block["different_groups"]["rp1"] = {"params": {"dense_ratio": ratio}, "modules": ["linear"]}
    model = init_compression(Layers(), {"row_pruning": block})
    masked_after_one_step(model, {"row_pruning": block}, lambda m: m.linear(numbers(2, 6)).sum())
    plain = Layers().linear
    mask = largest(plain.weight.detach().abs().sum(1), ratio)
    assert torch.equal(model.linear.weight, plain.weight * mask[:, None])
    assert torch.equal(model.linear.bias, plain.bias * mask)


@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_channels_l1(ratio: float) -> None:
    block = copy.deepcopy(CHANNELS)
    block["channel_pruning"]["shared_parameters"] |= {"schedule_offset": 0, "method": "l1", "round_to": 1}
    block["channel_pruning"]["different_groups"]["cp1"]["params"]["dense_ratio"] = ratio
    model = init_compression(ConvNet(), block)
    masked_after_one_step(model, block, lambda m: m(numbers(2, 3, 8, 8), torch.tensor([0, 1])))
    plain = ConvNet().conv1
    mask = largest(plain.weight.detach().abs().sum((1, 2, 3)), ratio)
    assert torch.equal(model.conv1.weight, plain.weight * mask.view(-1, 1, 1, 1))
    assert torch.equal(model.conv1.bias, plain.bias * mask)


@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_heads_are_equal_chunks_of_the_columns_of_the_output(ratio: float) -> None:
    block = copy.deepcopy(HEADS)
    block["head_pruning"]["shared_parameters"]["schedule_offset"] = 0
    block["head_pruning"]["different_groups"]["rp1"]["params"]["dense_ratio"] = ratio
    model = init_compression(tiny_bert(), block)
    ids = torch.arange(8)[None]
    masked_after_one_step(model, block, lambda m: m(input_ids=ids, labels=torch.tensor([1])).loss)
    stage: Any = run_of(model).techniques["head_pruning"]
    for index, (name, kept) in enumerate(sorted(stage.kept.items())):
        assert kept.tolist() == largest(stage.score.totals[name], ratio).nonzero().flatten().tolist()
        weight = tiny_bert().bert.encoder.layer[index].attention.output.dense.weight.detach()
        chunks = weight.t().reshape(4, -1)
        mask = torch.zeros(4, 1)
        mask[kept] = 1
        expected = (chunks * mask).reshape(32, 32).t()
        assert torch.equal(model.bert.encoder.layer[index].attention.output.dense.weight, expected)
    assert len(stage.kept) == 2


# -- bits over time ----------------------------------------------------------------------------------------------


def test_bits_fall_at_p_2p_4p_and_the_blend_starts_anew_at_each() -> None:
    """MoQ: start 12, target 6, period 2, after an offset of 3; the real share loses 0.1 a step since the last drop."""
    shared = {
        "schedule_offset": 3,
        "fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.1},
        "quantize_weight_in_forward": False,
    }
    params = {"start_bits": 10, "target_bits": 6, "quantization_period": 2}
    model = prepared("weight_quantization", shared, params, ["linear"])
    optimizer = torch.optim.SGD(model.linear.parameters(), lr=0.0)
    scheduler = compression_scheduler(model, run_of(model).block)
    x, weight = numbers(2, 6), Layers().linear.weight.detach()
    bits, period, since = 10, 2, 0
    for step in range(24):
        elapsed = step - 3
        while elapsed >= period and bits > 6:
            bits, since, period = bits - 1, period, period * 2
        expected = weight
        if elapsed >= 0 and bits <= 8:
            share = max(0.0, 1 - 0.1 * (elapsed - since))
            expected = share * weight + (1 - share) * symmetric(weight, bits)
        output = F.linear(x, expected, model.linear.bias)
        torch.testing.assert_close(model.linear(x), output, rtol=1e-5, atol=1e-6)
        model.linear(x).sum().backward()
        optimizer.step()
        scheduler.step()
    assert bits == 6
