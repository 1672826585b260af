"""What a step and a forward compute, beside torch's own counter of operations and what autograd really keeps."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ds_compress
from ds_compress.compat import redundancy_clean
from ds_compress.estimate.compute import compute
from ds_compress.estimate.devices import DEVICES, device
from ds_compress.estimate.products import work_of
from ds_compress.estimate.run_layout import RunLayout
from tests.models import tiny_bert, tiny_gpt2, tiny_llama
from tests.multirank.common import batches, ds_config, engine_of

TEXTS, SEQUENCE = 3, 8
TOKENS = TEXTS * SEQUENCE


def tiny_mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MixtralConfig(
        vocab_size=40, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes
    )
    model: nn.Module = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


def counted(model: Any) -> tuple[int, int]:
    """Of forward, and of forward and backward; with products of attention that the counter knows."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.randint(0, 40, (TEXTS, SEQUENCE))).logits
        forward = counter.get_total_flops()
        logits.float().square().sum().backward()
        return forward, counter.get_total_flops()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mixtral, lambda: tiny_llama(tied=False)])
def test_operations_are_those_that_torch_counts(make: Callable[[], nn.Module]) -> None:
    model = make()
    work = work_of(model, ds_compress.plan(model, {}))
    forward, both = counted(model)
    assert TOKENS * work.forward_flops(SEQUENCE) == forward
    assert TOKENS * work.training_flops(SEQUENCE) == both


def test_a_layer_that_does_not_train_computes_no_gradient_of_its_weight() -> None:
    model = tiny_llama(tied=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    work = work_of(model, ds_compress.plan(model, {}))
    assert TOKENS * work.training_flops(SEQUENCE) == counted(model)[1]


def structured(key: str, ratio: float, **group: Any) -> dict[str, Any]:
    shared = {"enabled": True, "method": "l1", "schedule_offset": 100, "round_to": 1}
    return {
        key: {
            "shared_parameters": shared,
            "different_groups": {"g": {"params": {"dense_ratio": ratio}, **group}},
        }
    }


@pytest.mark.parametrize(
    "block",
    [
        structured("row_pruning", 0.25, modules=["mlp"]),
        structured("head_pruning", 0.5, modules=["self_attn"]),
        structured("depth_pruning", 0.5),
    ],
    ids=["rows", "heads", "depth"],
)
def test_what_is_left_of_a_pruned_model(block: dict[str, Any]) -> None:
    model = tiny_llama(layers=4)
    work = work_of(model, ds_compress.plan(model, block))
    small = redundancy_clean(model, {"compression_training": block})
    left = sum(product.flops_left for product in work.products)
    left += work.attention.left * work.attention.flops(SEQUENCE)
    assert TOKENS * left == counted(small)[0] < TOKENS * work.forward_flops(SEQUENCE)


W8A8: dict[str, Any] = {
    "weight_quantization": {
        "shared_parameters": {"enabled": True, "granularity": "per_channel"},
        "different_groups": {"g": {"params": {"start_bits": 8, "target_bits": 8}, "modules": ["layer"]}},
    },
    "activation_quantization": {
        "shared_parameters": {"enabled": True},
        "different_groups": {"g": {"params": {"bits": 8}, "modules": ["layer"]}},
    },
}


def kept_for_backward(block: dict[str, Any]) -> int:
    """Bytes of storages that autograd keeps of one forward, parameters left out."""
    with engine_of(tiny_bert(hidden=256), ds_config(0, block, "fp32")) as engine:
        own = {parameter.untyped_storage().data_ptr() for parameter in engine.module.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        data = batches(2)
        engine.backward(engine(**next(data)).loss)
        engine.step()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = engine(**next(data)).loss
        engine.backward(loss)
    return sum(kept.values())


@pytest.mark.usefixtures("single_process")
def test_fake_quantization_keeps_little_more_for_backward_than_a_plain_layer() -> None:
    model = tiny_bert(hidden=256)
    plan = ds_compress.plan(model, W8A8)
    tokens = next(batches(1))["input_ids"].numel()
    found = compute(plan, work_of(model, plan), RunLayout(), tokens, tokens)
    plain, quantized = kept_for_backward({}), kept_for_backward(W8A8)
    scales_of_weights = (
        2 * 4 * sum(target.shape[0] for target in plan.techniques["weight_quantization"].targets)
    )
    assert found.saved > 0
    assert 0 <= quantized - plain <= found.saved + scales_of_weights


@pytest.mark.usefixtures("single_process")
def test_a_step_with_a_teacher() -> None:
    block = {
        "distillation": {"enabled": True, "self_teacher": {"weights": "initial"}, "losses": {"logits": {}}}
    }
    model: Any = tiny_bert()
    plan = ds_compress.plan(model, block)
    model.set_attn_implementation("eager")
    data = next(batches(1))
    texts, sequence = data["input_ids"].shape
    with engine_of(model, ds_config(0, block, "fp32")) as engine, FlopCounterMode(display=False) as counter:
        engine.backward(engine(**data).loss)
    work = work_of(tiny_bert(), plan)
    found = compute(plan, work, RunLayout(), texts * sequence, sequence)
    assert found.teacher is not None and found.student == 3 * found.teacher
    # Pooler and classifier see one token of each text.
    heads = sum(product.flops for product in work.products if "encoder" not in product.module)
    seldom = 4 * heads * texts * (sequence - 1)
    assert found.student + found.teacher - seldom == counter.get_total_flops()


class TestDevice:
    def test_a_roofline_by_hand(self) -> None:
        """One Linear of 1,000 x 1,000 in int8: 1 MB of weights, 2 MFLOP a token."""
        slow = device("bf16=1,int8=4,bandwidth=1000")
        assert slow.seconds(2e6, 1e6) == pytest.approx(2e-6)
        assert slow.seconds(2e6, 1e6, "int8") == pytest.approx(1e-6), "memory"
        assert slow.seconds(2e9, 1e6, "int8") == pytest.approx(0.5e-3), "products"
        assert slow.kind("fp4") == "bf16" and DEVICES["b200-sxm"].kind("fp4") == "fp4"

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("abacus", "h100-sxm"),
            ("bf16=1", "bandwidth"),
            ("bandwidth=1", "bf16"),
            ("bf16=1,bandwidth=x", "'bandwidth=x'"),
            ("bf16=0,bandwidth=1", "above 0"),
            ("bf16=nan,bandwidth=1", "above 0"),
            ("fp64=1,bf16=1,bandwidth=1", "fp64"),
        ],
    )
    def test_what_is_no_device(self, text: str, word: str) -> None:
        with pytest.raises(ValueError, match=word):
            device(text)

    def test_latency_before_and_after(self) -> None:
        model = tiny_bert(hidden=256)
        plan = ds_compress.plan(model, W8A8)
        work = work_of(model, plan)
        found = compute(plan, work, RunLayout(), 4096, 32, device=device("bf16=1,int8=2,bandwidth=1e6"))
        one, many = found.latencies
        assert (one.tokens, many.tokens) == (1, 4096)
        quantized = sum(p.flops for p in work.products if ".layer." in p.module)
        rest = sum(p.flops for p in work.products) - quantized + work.attention.flops(32)
        assert many.before == pytest.approx(4096 * (quantized + rest) / 1e12)
        assert many.after == pytest.approx(4096 * (quantized / 2 + rest) / 1e12)
        assert not many.is_memory_bound
        starved = compute(plan, work, RunLayout(), 1, 1, device=device("bf16=1e6,int8=1e6,bandwidth=1"))
        assert starved.latencies[0].is_memory_bound
        assert 1.7 < starved.latencies[0].before / starved.latencies[0].after < 2
        assert starved.seconds["plain"] < starved.seconds["compressed"]


def test_experts_that_some_tokens_see() -> None:
    model = tiny_mixtral()
    work = work_of(model, ds_compress.plan(model, {}))
    experts = [product for product in work.products if "experts" in product.weight]
    assert experts and all(product.share == Fraction(1, 2) for product in experts)


def test_what_is_refused() -> None:
    model = tiny_llama()
    plan = ds_compress.plan(model, {})
    with pytest.raises(ValueError, match="--sequence"):
        compute(plan, work_of(model, plan), RunLayout(), 4, 8)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="--tokens"):
        work_of(convolution, ds_compress.plan(convolution, {}))
