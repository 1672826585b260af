"""Keys and values in FP8: what the attention kernel sees, its ranges, gradients, and models without a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ds_compress.config.schema.compression_training import parse_config
from ds_compress.engine.attach import attach_to_loop
from ds_compress.engine.build import prepare_model
from ds_compress.engine.teachers.self_teacher import quantizers_off
from ds_compress.errors import ConfigError
from ds_compress.modelinfo.attention_kernels import KernelInputs, add_hook
from ds_compress.modelinfo.decoder_attention import decoder_attentions
from ds_compress.techniques.kv_cache import KEYS, VALUES
from tests.models import tiny_bert, tiny_gpt2, tiny_llama


def prepared(block: dict[str, Any], model: nn.Module | None = None) -> tuple[nn.Module, Any]:
    model = (tiny_llama() if model is None else model).train()
    run = prepare_model(model, parse_config(block))
    attach_to_loop(run)
    return model, run


def step(model: nn.Module, run: Any, ids: torch.Tensor) -> float:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    run.end_step()
    return float(loss.detach())


IDS = torch.randint(0, 40, (2, 10), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_kernel_sees_keys_and_values_on_the_grid_of_a_static_scale(make: Any) -> None:
    model, run = prepared({"kv_cache": "fp8"}, make())
    attentions = decoder_attentions(model)
    assert len(attentions) == 2
    seen: dict[str, list[KernelInputs]] = {}
    for name, module in attentions.items():
        add_hook(module, lambda given, name=name: seen.setdefault(name, []).append(given))
    step(model, run, IDS)
    for name, module in attentions.items():
        first = seen.pop(name)[0]
        for kind, tensor in ((KEYS, first.key), (VALUES, first.value)):
            found = vars(module)[kind].input_range
            torch.testing.assert_close(found, torch.stack([tensor.min(), tensor.max()]).detach())
    known = {(n, kind): vars(m)[kind].input_range for n, m in attentions.items() for kind in (KEYS, VALUES)}
    step(model, run, IDS)
    for name in attentions:
        given = seen[name][0]
        for kind, tensor in ((KEYS, given.key), (VALUES, given.value)):
            scale = known[name, kind].abs().max() / 448
            values = tensor.detach() / scale
            torch.testing.assert_close(values, values.to(torch.float8_e4m3fn).float(), rtol=1e-5, atol=1e-5)


def test_nothing_changes_before_the_offset_and_without_quantizers() -> None:
    plain = tiny_llama()
    model, run = prepared({"kv_cache": {"enabled": True, "schedule_offset": 1}}, copy.deepcopy(plain))
    expected = plain(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, expected)
    step(model, run, IDS)
    step(model, run, IDS)
    with quantizers_off(model):
        exact = model.eval()(input_ids=IDS).logits
    assert not torch.equal(model(input_ids=IDS).logits, exact)
    run.detach()
    assert torch.equal(model(input_ids=IDS).logits, exact)
    assert model.config._attn_implementation == plain.config._attn_implementation


@pytest.mark.parametrize("model", [tiny_bert(), nn.Sequential(nn.Linear(4, 4))])
def test_a_model_without_a_cache_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match='remove "kv_cache"'):
        prepare_model(model, parse_config({"kv_cache": "fp8"}))


def test_state_is_by_module_and_comes_back() -> None:
    model, run = prepared({"kv_cache": "fp8"})
    step(model, run, IDS)
    technique = run.techniques["kv_cache"]
    state = technique.state_dict()
    assert set(state["ranges"]) == {f"model.layers.{n}.self_attn.{k}" for n in (0, 1) for k in (KEYS, VALUES)}
    assert technique.metrics() == {"layers_with_range": 2.0}
    other, other_run = prepared({"kv_cache": "fp8"})
    other_run.techniques["kv_cache"].load_state_dict(state)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    renamed = technique.renamed_state(
        lambda name: name.replace("layers.1", "layers.0") if "layers.1" in name else None
    )
    assert set(renamed["ranges"]) == {f"model.layers.0.self_attn.{k}" for k in (KEYS, VALUES)}
