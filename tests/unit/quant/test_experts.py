"""Modules of fused experts with quantizers: what they keep for backward, whom they disturb, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ds_compress.quant import experts, layers
from ds_compress.quant.experts import QATExperts
from ds_compress.quant.presented import Stack, present
from tests.zoo.expert_reference import blocks, prepared, ranges_from_observed
from tests.zoo.mixtures import mixture

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
_INT4 = blocks(
    {"target_bits": 4, "granularity": "per_column_group", "group_size": 8},
    weight_quantization={"quantize_weight_in_forward": True, "narrow_range": False},
)
_W8A8 = blocks({"target_bits": 8, "granularity": "per_channel"}, {"bits": 8})
_STATIC = blocks(
    {"target_bits": 8, "granularity": "per_channel"},
    {"bits": 8},
    activation_quantization={"range_calibration": "static", "narrow_range": True},
)


def _only_experts(block: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(block)
    for settings in made.values():
        settings["different_groups"]["g"]["modules"] = ["experts"]
    return made


def experts_of(model: nn.Module) -> QATExperts:
    return next(module for module in model.modules() if isinstance(module, QATExperts))


def alone(
    block: dict[str, Any],
    implementation: str = "grouped_mm",
    name: str = "qwen3_moe",
    step: int = 0,
    **config: Any,
) -> QATExperts:
    """The experts of one layer, after so many optimizer steps."""
    model: Any = mixture(name, **config)
    for technique in prepared(model, _only_experts(block)).values():
        technique.after_step(step)
    model.config._experts_implementation = implementation
    return experts_of(model)


def plain(implementation: str = "grouped_mm", name: str = "qwen3_moe", **config: Any) -> nn.Module:
    model: Any = mixture(name, **config)
    model.config._experts_implementation = implementation
    return next(m for n, m in model.named_modules() if n.endswith("experts"))


def routed(rows: int = 12, experts: int = 4, hidden: int = 16, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(rows, hidden, generator=generator)
    scores = torch.rand(rows, experts, generator=generator)
    weights, index = scores.softmax(-1).topk(2, dim=-1)
    return hidden_states, index, weights


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weak references to the memory of every stack that is presented; `stacks[i].expired()`."""
    found: list[Any] = []

    def recorded(stack: Any) -> torch.Tensor:
        values = present(stack)
        found.append(StorageWeakRef(values.untyped_storage()))
        return values

    monkeypatch.setattr(experts, "present", recorded)
    return found


def gradients(module: nn.Module, given: tuple[torch.Tensor, ...], run: Any = None) -> dict[str, torch.Tensor]:
    module.zero_grad()
    hidden, *routing = given
    hidden = hidden.clone().requires_grad_()
    y = module(hidden, *routing) if run is None else run(module, hidden, *routing)
    y.square().sum().backward()
    assert hidden.grad is not None
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return found | {"hidden": hidden.grad.clone(), "y": y.detach()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("block", [_INT4, _W8A8], ids=["W4A16", "W8A8"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_quantized_stack_is_kept_for_backward(
    stacks: list[Any], implementation: str, name: str, block: dict[str, Any]
) -> None:
    module = alone(block, implementation, name)
    given = routed()
    y = module(given[0].requires_grad_(), *given[1:])
    assert len(stacks) == 2
    assert all(stack.expired() for stack in stacks)
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_backward_quantizes_each_stack_once(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    module = alone(_INT4, implementation)
    calls: list[bool] = []
    quantized = Stack.quantized

    def counted(self: Stack, parameter: Any, step_size: Any, again: bool) -> Any:
        calls.append(again)
        return quantized(self, parameter, step_size, again)

    monkeypatch.setattr(Stack, "quantized", counted)
    gradients(module, routed())
    assert calls == [False, False, True, True]


def test_it_can_go_back_twice() -> None:
    module, (hidden, *routing) = alone(_INT4, "eager"), routed()
    hidden.requires_grad_()
    y = module(hidden, *routing).square().sum()
    y.backward(retain_graph=True)
    first = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    y.backward()
    for parameter, once in zip(module.parameters(), first, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * once)


def test_second_derivatives_are_refused() -> None:
    module, (hidden, *routing) = alone(_INT4), routed()
    hidden.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(module(hidden, *routing).square().sum(), hidden, create_graph=True)


@pytest.mark.parametrize("block", [_INT4, _W8A8, _STATIC], ids=["W4A16", "W8A8", "static"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(
    stacks: list[Any], reentrant: bool, implementation: str, block: dict[str, Any]
) -> None:
    module = alone(block, implementation)
    if block is _STATIC:
        module.train()
        module(*routed())
        ranges_from_observed(module)
    expected = gradients(module, routed())
    del stacks[:]

    def run(module: nn.Module, *args: torch.Tensor) -> Any:
        y = checkpoint(module, *args, use_reentrant=reentrant)
        assert all(stack.expired() for stack in stacks)
        return y

    assert_same(gradients(module, routed(), run), expected)
    assert len(stacks) == 4


def test_hooks_that_were_there_get_everything_else() -> None:
    module, (hidden, *routing) = alone(_INT4), routed()
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        y = module(hidden.requires_grad_(), *routing)
    parameters = list(module.parameters())
    assert all(any(kept is p for kept in packed) for p in parameters)
    assert any(kept.dim() == 2 for kept in packed)
    values = [layers.quantized_weight(module, name) for name in ("gate_up_proj", "down_proj")]
    # As views they may be transposed.
    assert not any(kept.sum().equal(value.sum()) for kept in packed for value in values if kept.dim() == 3)
    y.sum().backward()


@pytest.mark.parametrize("block", [_INT4, _W8A8], ids=["W4A16", "W8A8"])
@pytest.mark.parametrize("width", [12, 16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(stacks: list[Any], implementation: str, width: int, block: dict[str, Any]) -> None:
    """Rows of 12 numbers of 16 bits are not what grouped products take."""
    module = alone(block, implementation, moe_intermediate_size=width)
    exact = gradients(module, routed())

    def run(module: nn.Module, *args: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y = module(*args)
        assert all(stack.expired() for stack in stacks)
        return y.float()

    found = gradients(module, routed(), run)
    for name, value in exact.items():
        assert found[name].dtype is (torch.float32 if name != "y" else found[name].dtype)
        assert (found[name] - value).norm() < 0.03 * value.norm(), name


@pytest.mark.parametrize("block", [_INT4, _W8A8, _STATIC], ids=["W4A16", "W8A8", "static"])
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_compiled(implementation: str, block: dict[str, Any]) -> None:
    module = alone(block, implementation)
    if block is _STATIC:
        module.train()
        module(*routed())
        ranges_from_observed(module)
        module.eval()
    expected = gradients(module, routed())
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager")
    found = gradients(module, routed(), lambda _, *args: compiled(*args))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_frozen_weights_pass_gradients_on() -> None:
    module = alone(_INT4)
    expected = gradients(module, routed())
    module.requires_grad_(False)
    found = gradients(module, routed())
    assert found.keys() == {"hidden", "y"}
    assert_same(found, {key: expected[key] for key in found})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block", [_INT4, _W8A8, _STATIC], ids=["W4A16", "W8A8", "static"])
def test_an_expert_without_tokens_has_a_gradient_of_zeros(implementation: str, block: dict[str, Any]) -> None:
    module = alone(block, implementation).train()
    hidden, index, weights = routed()
    index = index.clone().clamp_(max=2)
    found = gradients(module, (hidden, index, weights))
    for name in ("gate_up_proj", "down_proj"):
        assert bool(found[name].isfinite().all())
        assert not bool(found[name][3].any()) and bool(found[name][2].any())


def test_off_is_the_base_class() -> None:
    block = blocks(
        {"target_bits": 4},
        {"bits": 8},
        weight_quantization={"schedule_offset": 5},
        activation_quantization={"schedule_offset": 5},
    )
    assert_same(gradients(alone(block), routed()), gradients(plain(), routed()))


def test_detached_it_is_what_it_was() -> None:
    model: Any = mixture("qwen3_moe")
    techniques = prepared(model, _only_experts(_W8A8 | {}))
    module = experts_of(model)
    assert "gate_up_proj=int8" in repr(module) and "input of down_proj=int8" in repr(module)
    for technique in techniques.values():
        technique.detach()
    assert not isinstance(module, QATExperts)
    assert type(module) is type(plain()) and vars(module).keys() == vars(plain()).keys()


def test_copies_and_pickles() -> None:
    module, given = alone(_W8A8), routed()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert torch.equal(other(*given), module(*given))


def test_a_forward_that_was_replaced_is_refused() -> None:
    model: Any = mixture("qwen3_moe")
    module = next(m for n, m in model.named_modules() if n.endswith("experts"))
    vars(module)["forward"] = module.forward
    with pytest.raises(ValueError, match="was replaced on the module itself"):
        prepared(model, _only_experts(_INT4))


class _Hidden(nn.Module):
    """Experts that multiply in a way of their own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.gate_up_proj = nn.Parameter(torch.randn(4, 24, 16))
        self.down_proj = nn.Parameter(torch.randn(4, 16, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self._parameters["gate_up_proj"] if self.way == "past" else self.gate_up_proj
        assert up is not None
        inner = torch.einsum("nh,eoh->eno", x, up)
        inner = inner[..., :12] * inner[..., 12:]
        return torch.einsum("eno,eho->nh", inner, self.down_proj)


@pytest.mark.parametrize(
    ("way", "block", "message"),
    [
        ("past", _INT4, r"without reading \['gate_up_proj'\]"),
        ("einsum", _W8A8, "in a way that was not seen"),
    ],
)
def test_experts_that_compute_past_their_quantizers(way: str, block: dict[str, Any], message: str) -> None:
    model = nn.Sequential(_Hidden(way))
    made = copy.deepcopy(block)
    for settings in made.values():
        settings["different_groups"]["g"]["modules"] = ["proj"]
    prepared(model, made)
    with pytest.raises(RuntimeError, match=message):
        model(torch.randn(3, 16))


class TestStaticRanges:
    def test_each_expert_has_its_own_and_keeps_it_without_tokens(self) -> None:
        module = alone(_STATIC).train()
        quantizer = dict(module.input_quantizers())["gate_up_proj"]
        hidden, index, weights = routed()
        index = index.clone().clamp_(max=2)
        module(hidden, index, weights)
        assert quantizer.observed is not None
        for expert in range(3):
            rows = hidden[(index == expert).any(1)]
            expected = torch.stack([-rows.min(), rows.max()])
            assert torch.equal(quantizer.observed[expert], expected)
        assert bool(quantizer.observed[3].isneginf().all())

    def test_rows_of_an_expert_without_range_pass_as_they_are(self) -> None:
        module = alone(_STATIC).eval()
        quantizers = dict(module.input_quantizers())
        for quantizer in quantizers.values():
            quantizer.input_range = torch.tensor([[-1.0, 1.0]] * 3 + [[torch.nan] * 2])
        hidden, index, weights = routed()
        alone_in_3 = torch.full_like(index, 3)
        found = module(hidden, alone_in_3, weights)
        for quantizer in quantizers.values():
            quantizer.enabled = False
        assert torch.equal(found, module(hidden, alone_in_3, weights))
        for quantizer in quantizers.values():
            quantizer.enabled = True
        assert not torch.equal(module(hidden, index, weights), module(hidden, alone_in_3, weights))
        assert bool(module(hidden, index, weights).isfinite().all())

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_a_fault_shows_and_does_not_become_a_range(self, bad: float, implementation: str) -> None:
        module = alone(_STATIC, implementation).train()
        for quantizer in dict(module.input_quantizers()).values():
            quantizer.input_range = torch.tensor([[-1.0, 1.0]] * 4)
        hidden, index, weights = routed()
        hidden[3, 5] = bad
        y = module(hidden, index, weights)
        assert bool(y[3].isnan().all())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_dynamic_range_of_the_tensor_is_one_of_each_expert(implementation: str) -> None:
    block = blocks(
        None, {"bits": 8}, activation_quantization={"granularity": "per_tensor", "narrow_range": True}
    )
    given = routed()
    found = alone(block, implementation)(*given)
    module = alone(block, "eager")
    rows = [given[0][(given[1] == expert).any(1)] for expert in range(4)]
    assert len({float(own.abs().max()) for own in rows}) > 1
    torch.testing.assert_close(found, module(*given), rtol=1e-5, atol=1e-5)


_MIXED = {"fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.5}}
_WEIGHTS: dict[str, dict[str, Any]] = {
    "stochastic": blocks({"target_bits": 4}, weight_quantization={"rounding": "stochastic"}),
    "stochastic channels": blocks(
        {"target_bits": 4, "granularity": "per_channel"}, weight_quantization={"rounding": "stochastic"}
    ),
    "blended": blocks({"target_bits": 4, "granularity": "per_channel"}, weight_quantization=_MIXED),
    "ternary": blocks({"target_bits": 2, "granularity": "per_channel"}),
    "binary": blocks({"target_bits": 1, "granularity": "per_tensor"}),
    "asymmetric": blocks(
        {"target_bits": 4, "granularity": "per_column_group", "group_size": 4},
        weight_quantization={"quantization_type": "asymmetric"},
    ),
    "static": blocks(
        {"target_bits": 4, "granularity": "per_channel"}, weight_quantization={"scales": "static"}
    ),
    "searched": blocks({"format": "nvfp4"}, weight_quantization={"scales": "searched"}),
    "learned": blocks({"format": "mxfp8", "group_size": None}, weight_quantization={"scales": "learned"}),
    "learned parts": blocks(
        {"target_bits": 4}, weight_quantization={"scales": "learned", "quantize_groups": 4}
    ),
    "squares": blocks({"format": "fp8_e4m3", "granularity": "per_block"}),
    "nf4": blocks({"format": "nf4"}),
    "scheduled": blocks(
        {"format": "fp8_e4m3", "earlier_formats": [{"format": "int", "bits": 8, "steps": 3}]}
    ),
}


@pytest.mark.parametrize("kind", _WEIGHTS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_forward_computes_with_what_is_exported(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """And backward with the same: the gradient of the inputs is that of a plain module with these weights."""
    found: list[torch.Tensor] = []

    def recorded(stack: Stack) -> torch.Tensor:
        values = present(stack)
        found.append(values.detach().clone())
        return values

    monkeypatch.setattr(experts, "present", recorded)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    config = {key: sizes[key] for key in sizes if name == "qwen3_moe" or "moe" not in key}
    module = alone(_WEIGHTS[kind], "grouped_mm", name, step=1, **config)
    given = routed(hidden=64)
    ours = gradients(module, given)
    other = plain("grouped_mm", name, **config)
    for position, parameter in enumerate(("gate_up_proj", "down_proj")):
        exported = layers.quantized_weight(module, parameter)
        assert torch.equal(found[position], exported)
        assert not torch.equal(exported, other.get_parameter(parameter))
        other.get_parameter(parameter).data.copy_(exported)
    expected = gradients(other, given)
    torch.testing.assert_close(ours["y"], expected["y"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["hidden"], expected["hidden"], rtol=1e-4, atol=1e-4)
    if "learned" in kind:
        assert bool(ours["down_proj_step_size"].any())


class _Ungated(nn.Module):
    """Experts without a gate, as the interface of transformers has them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = 4
        self.up_proj = nn.Parameter(torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0)))
        self.down_proj = nn.Parameter(torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(1)))
        self.act_fn = nn.ReLU()

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert in range(4):
            token, place = torch.where(index == expert)
            inner = self.act_fn(nn.functional.linear(hidden[token], self.up_proj[expert]))
            y = nn.functional.linear(inner, self.down_proj[expert])
            out.index_add_(0, token, y * weights[token, place, None])
        return out


@pytest.mark.parametrize("block", [_INT4, _W8A8], ids=["W4A16", "W8A8"])
def test_experts_without_a_gate(block: dict[str, Any]) -> None:
    moe = pytest.importorskip("transformers.integrations.moe")
    cls = moe.use_experts_implementation(
        type("Ungated", (_Ungated,), {"forward": _Ungated.forward}), has_gate=False
    )
    found = []
    for implementation in IMPLEMENTATIONS:
        config = type("Config", (), {"_experts_implementation": implementation})()
        model = nn.Sequential()
        model.add_module("experts", cls(config))
        prepared(model, _only_experts(block))
        found.append(gradients(experts_of(model), routed()))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-4)
    exact = gradients(cls(type("Config", (), {"_experts_implementation": "eager"})()), routed())
    assert not torch.allclose(found[0]["y"], exact["y"], rtol=1e-4)
