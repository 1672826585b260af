"""The defects 10 to 18 of the removed library; each docstring says what it did. See test_defects for the others."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from torch import nn

import ds_compress
from ds_compress.compat import init_compression, redundancy_clean
from ds_compress.compat.utils import AsymQuantizer, SymQuantizer, TernaryQuantizer
from ds_compress.engine.registry import run_of
from tests.legacy_blocks import (
    CHANNELS,
    HEADS,
    ConvNet,
    images,
    sparse_pruning,
)
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, train
from tests.single import init_single_process
from tests.unit.compat.test_defects import loop, of_bert, one_group


@pytest.fixture(autouse=True, scope="module")
def single_process() -> None:
    init_single_process()
    tiny_bert()  # transformers must be imported before the first zero.Init, which patches torch


def test_10_ties_hooks_frozen_weights_modes_and_counters_stay() -> None:
    """Old: every Linear, Conv2d, Embedding and BatchNorm2d was replaced: tied weights came apart, forward hooks were
    dropped, frozen weights trained, eval() was forgotten, num_batches_tracked began at 0."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False).eval()
            self.norm = nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 8, bias=False)
            self.head.weight = self.table.weight

    model, calls = Tied(), []
    model.norm(torch.randn(2, 4, 3, 3))
    model.frozen.register_forward_hook(lambda *_: calls.append(1))
    modules = dict(model.named_modules())
    block = one_group("weight_quantization", {"start_bits": 8, "target_bits": 8}, ["table", "frozen"])
    init_compression(model, block)
    assert dict(model.named_modules()) == modules
    assert model.head.weight is model.table.weight
    assert not model.frozen.weight.requires_grad and not model.frozen.training
    assert int(model.norm.num_batches_tracked) == 1
    model.frozen(torch.ones(1, 4))
    assert calls == [1]


@pytest.mark.parametrize("quantizer", [SymQuantizer, TernaryQuantizer, AsymQuantizer])
def test_11_groups_of_zeros_or_of_one_constant(quantizer: Any) -> None:
    """Old: 0 / 0: NaN for an all-zero group (symmetric, ternary) and for a constant one (asymmetric)."""
    constant = 0.0 if quantizer is not AsymQuantizer else 0.7
    x = torch.stack([torch.full((6,), constant), torch.linspace(-1, 1, 6)])
    y = quantizer.apply(x, 8, None, None, 2)
    assert torch.equal(y[0], x[0]) and torch.isfinite(y).all()


def test_12_the_largest_weight_has_a_code() -> None:
    """Old: codes from -128 to 127 of max / 128: 1.0 came back as 0.992. That stays for a legacy config, which says
    nothing of `narrow_range`; new keys (`granularity`, `learned_scale`) have the grid that reaches both ends."""

    def largest(**shared: Any) -> float:
        model = nn.Sequential(nn.Linear(4, 1, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, -0.5, 0.25, 0.0]]))
        params = {"start_bits": 8, "target_bits": 8}
        init_compression(model, one_group("weight_quantization", params, ["0"], **shared))
        return float(model(torch.tensor([[1.0, 0, 0, 0]])))

    assert largest() == 127 / 128
    assert largest(narrow_range=True) == largest(granularity="per_channel") == 1.0


def test_13_an_embedding_is_pruned() -> None:
    """Old: AttributeError: Embedding_Compress had no enable_sparse_pruning."""
    config = one_group("sparse_pruning", {"dense_ratio": 0.25}, ["word_embeddings"], method="l1")
    model = init_compression(tiny_bert().train(), config)
    loop(model, config, 2, of_bert)
    table = model.bert.embeddings.word_embeddings.weight
    assert int((table != 0).sum()) == table.numel() // 4


def test_13_a_convolution_is_quantized_after_an_offset() -> None:
    """Old: AttributeError: Conv2dLayer_Compress lacked weight_quantization_enabled until the scheduler set it."""
    params = {"start_bits": 8, "target_bits": 4, "quantization_period": 0}
    config = one_group(
        "weight_quantization", params, ["conv2"], quantize_weight_in_forward=True, schedule_offset=2
    )
    model = init_compression(ConvNet().train(), config)
    plain = copy.deepcopy(model.conv2.weight.detach())
    data = images(3)
    assert torch.equal(ds_compress.quant.layers.quantized_weight(model.conv2), plain)
    loop(model, config, 2, lambda m, step: m(*data[step]))
    assert len(ds_compress.quant.layers.quantized_weight(model.conv2).unique()) <= 16


def test_13_a_batch_norm_without_affine() -> None:
    """Old: AttributeError: 'NoneType' object has no attribute 'device', whatever the JSON asked for."""
    model = ConvNet()
    model.norm = nn.BatchNorm2d(16, affine=False)
    block = copy.deepcopy(CHANNELS)
    block["channel_pruning"]["shared_parameters"]["method"] = "l1"
    init_compression(model.train(), block)
    data = images(5)
    loop(model, block, 5, lambda m, step: m(*data[step]))
    cleaned = redundancy_clean(model, block)
    assert cleaned.norm.num_features == 8 and cleaned.norm.running_mean.shape == (8,)


def test_14_words_for_what_is_wrong() -> None:
    """Old: absent `modules` became the regex "*": re.error; misspelt keys and regexes that reach nothing were silent;
    a disabled block without different_groups raised KeyError."""
    params = {"start_bits": 8, "target_bits": 8}
    no_modules = one_group("weight_quantization", params, [])
    del no_modules["weight_quantization"]["different_groups"]["g"]["modules"]
    model = init_compression(tiny_bert(), no_modules)
    assert len(run_of(model).plan.techniques["weight_quantization"].targets) == 14
    disabled = {"weight_quantization": {"shared_parameters": {"enabled": False}}}
    assert run_of(init_compression(tiny_bert(), disabled)) is None
    misspelt = one_group("weight_quantization", params, ["encoder"], quantise_groups=4)
    misspelt["weight_quantization"]["different_groups"]["h"] = {"params": params, "module": ["pooler"]}
    with pytest.raises(ds_compress.ConfigError) as caught:
        init_compression(tiny_bert(), misspelt)
    assert len(caught.value.problems) == 2 and "quantize_groups" in str(caught.value)
    nothing = one_group("weight_quantization", params, ["attenshun.self.query"])
    with pytest.raises(ds_compress.ConfigError, match=r"reaches none[\s\S]*attention\.self\.query"):
        init_compression(tiny_bert(), nothing)


def test_15_heads_leave_sizes_and_config_right() -> None:
    """Old: weights were cut, but in_features, out_features, num_attention_heads and the config kept their old values:
    the forward went on only where nothing reads them, and what was saved did not load."""
    config = {"compression_training": HEADS}
    model = init_compression(tiny_bert().train(), config)
    loop(model, config, 6, of_bert)
    model.eval()
    batch = next(batches(1))
    expected = model(**batch).logits
    cleaned = redundancy_clean(model, config)
    attention = cleaned.bert.encoder.layer[0].attention
    assert attention.self.query.out_features == attention.output.dense.in_features == 16
    assert attention.self.num_attention_heads == cleaned.config.num_attention_heads == 2
    torch.testing.assert_close(cleaned(**batch).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_15_fused_and_grouped_attention(family: str) -> None:
    """Old: no fused query-key-value matrix, no key/value groups: `related_modules` could not express them."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=4,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
        modules = ["attn.c_proj"]
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=8, num_key_value_heads=4,
            )
        )  # fmt: skip
        modules = ["o_proj"]
    config = one_group("head_pruning", {"dense_ratio": 0.5}, modules, method="topk", num_heads=4)
    if family == "llama":
        config["head_pruning"]["shared_parameters"]["num_heads"] = 8
    init_compression(model.train(), config)
    ids = torch.arange(24).view(2, 12)
    loop(model, config, 3, lambda m, step: m(input_ids=ids, labels=ids).loss)
    model.eval()
    expected = model(input_ids=ids).logits
    cleaned = redundancy_clean(model, config)
    torch.testing.assert_close(cleaned(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert cleaned.config.num_attention_heads == (2 if family == "gpt2" else 4)
    assert getattr(cleaned.config, "num_key_value_heads", 2) == 2


def test_16_rounding_is_as_it_was_set() -> None:
    """Old: the CUDA path of MoQ asked for `nearest_neighbor`, which no config says, and so always rounded
    stochastically."""

    def outputs(rounding: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16)).train()
        params = {"start_bits": 4, "target_bits": 4}
        config = one_group("weight_quantization", params, ["0"], rounding=rounding)
        init_compression(model, config)
        x, seen = torch.ones(1, 16), []

        def loss(m: nn.Module, step: int) -> torch.Tensor:
            seen.append(m(x).detach())
            return m(x).sum()

        loop(model, config, 3, loss, lr=0.0)
        return seen

    nearest, stochastic = outputs("nearest"), outputs("stochastic")
    assert torch.equal(nearest[0], nearest[1])
    assert not torch.equal(stochastic[0], stochastic[1]) and not torch.equal(stochastic[0], nearest[0])


def test_16_what_clips_gets_no_gradient() -> None:
    """Old: the straight-through gradient also pushed values that had left the grid further out."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -0.5, 0.25, 0.1]]))
    params = {"start_bits": 4, "target_bits": 4}
    config = one_group("weight_quantization", params, ["0"], quantize_weight_in_forward=True)
    init_compression(model, config)
    model(torch.ones(1, 4)).sum().backward()
    # 1.0 lies at 8 of 7 codes (max / 8 each): it clips.
    assert model[0].weight.grad.tolist() == [[0.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("method", ["l1", "topk"])
def test_17_a_mask_is_a_bit_and_scores_are_no_parameters(method: str) -> None:
    """Old: l1 kept a mask of the weight's dtype as a buffer in every rank; topk added as many trainable parameters
    as it masked weights, and sorted the layer at every forward."""
    config = {"compression_training": sparse_pruning(method, schedule_offset=1)}
    model = tiny_bert().train()
    parameters, buffers = list(model.parameters()), dict(model.named_buffers())
    init_compression(model, config)
    loop(model, config, 2, of_bert)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert dict(model.named_buffers()).keys() == buffers.keys()
    stage: Any = run_of(model).techniques["sparse_pruning"]
    weights = sum(math.prod(target.shape) for target in stage.targets.values())
    assert stage.mask_bytes() == weights / 8
    with (
        mock.patch("torch.Tensor.sort", side_effect=AssertionError),
        mock.patch("torch.sort", side_effect=AssertionError),
    ):
        of_bert(model, 0)


def test_18_integers_on_disk(tmp_path: Path) -> None:
    """Old: redundancy_clean left fp32 weights that took few values: no integers, no scales, files not smaller."""
    block = one_group("weight_quantization", {"start_bits": 8, "target_bits": 8}, ["encoder"])
    config = ds_config(0, block)
    sizes = {}
    for name in ("plain", "quantized"):
        model = tiny_bert(hidden=64)
        if name == "plain":
            model.save_pretrained(tmp_path / name)
        else:
            init_compression(model, config)
            with engine_of(model, config) as engine:
                train(engine, batches(2))
                cleaned = redundancy_clean(engine, config)
            ds_compress.export(cleaned, tmp_path / name, "torch", check=False, embeddings="float")
            with safe_open(next((tmp_path / name).glob("*.safetensors")), "pt") as file:
                dtypes = [file.get_tensor(key).dtype for key in file.keys()]  # noqa: SIM118
            assert dtypes.count(torch.int8) == 12
        sizes[name] = sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
    assert 0 < sizes["quantized"] < 0.5 * sizes["plain"]
