"""Attention of served models: the kernel where it fits, torch where it does not, and the same numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ds_compress
from ds_compress.export import served_attention as attention
from tests.quantized import quantized
from tests.zoo.models import ZOO, inputs_of

MODULE: Any = SimpleNamespace(is_causal=False)


def heads(queries: int, keys: int, groups: int = 4, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 4, queries, 16), (2, groups, keys, 16), (2, groups, keys, 16))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def by_torch(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    y: torch.Tensor = sdpa_attention_forward(module, *args, **kwargs)[0]
    return y


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each call of the kernel."""
    made: list[str] = []
    ops = attention.kernels()
    counted = SimpleNamespace(attention=lambda *a, **k: made.append("kernel") or ops.attention(*a, **k))
    monkeypatch.setattr(attention, "kernels", lambda: counted)
    return made


MASKS = {
    "none": None,
    "bool": torch.rand(2, 1, 9, 9) < 0.8,
    "added": torch.where(torch.rand(2, 1, 1, 9) < 0.8, 0.0, torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("is_causal", [None, False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_computes_what_torch_does(
    groups: int, mask: str, is_causal: bool | None, calls: list[str]
) -> None:
    given = (*heads(9, 9, groups), MASKS[mask])
    for of_module in (False, True):
        module: Any = SimpleNamespace(is_causal=of_module, num_key_value_groups=4 // groups)
        for scaling in (None, 0.3):
            options = {"scaling": scaling, "is_causal": is_causal}
            y, nothing = attention.served_attention(module, *given, **options)
            torch.testing.assert_close(y, by_torch(module, *given, **options), rtol=1e-5, atol=1e-5)
            assert nothing is None
    assert calls == ["kernel"] * 4


def test_an_empty_cache_behind_the_tokens_is_not_seen(calls: list[str]) -> None:
    given, options = (*heads(9, 30), None), {"is_causal": True}
    y, _ = attention.served_attention(MODULE, *given, **options)
    torch.testing.assert_close(y, by_torch(MODULE, *given, **options), rtol=1e-5, atol=1e-5)
    assert calls == ["kernel"]


ELSE: dict[str, Any] = {
    "few queries": (heads(4, 40), {}),
    "many keys": (heads(9, 1025), {}),
    "bf16 and many keys": (heads(9, 65, dtype=torch.bfloat16), {}),
    "fp64": (heads(9, 9, dtype=torch.float64), {}),
    "gradients": ([t.requires_grad_() for t in heads(9, 9)], {}),
    "dropout": (heads(9, 9), {"dropout": 1e-9}),
    "position bias": (heads(9, 9), {"position_bias": torch.randn(1, 4, 9, 9)}),
}


@pytest.mark.parametrize("case", ELSE)
def test_what_the_kernel_does_not_take_goes_to_torch(case: str, calls: list[str]) -> None:
    given, options = ELSE[case]
    y, _ = attention.served_attention(MODULE, *given, None, **options)
    torch.testing.assert_close(y, by_torch(MODULE, *given, None, **options), rtol=1e-5, atol=1e-5)
    assert not calls
    assert y.requires_grad == (case == "gradients")


def test_without_gradients_to_record_the_kernel_takes_parameters(calls: list[str]) -> None:
    with torch.no_grad():
        attention.served_attention(MODULE, *(t.requires_grad_() for t in heads(9, 9)), None)
    assert calls == ["kernel"]


def test_what_torch_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="softcap"):
        attention.served_attention(MODULE, *heads(9, 9), None, softcap=3.0)


@pytest.mark.parametrize("name", ["bert_classifier", "llama"])
def test_a_served_model_uses_it_unless_it_is_not_fused(
    name: str, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "has_avx512", lambda: True)
    model = ZOO[name]()
    inputs = inputs_of(model)
    quantized(model, 8, {"range_calibration": "dynamic"}, ("layer",), run=None)
    ds_compress.export(model, tmp_path / "out", format="torch", check=False)
    served: Any = ds_compress.from_pretrained(tmp_path / "out")
    plain: Any = ds_compress.from_pretrained(tmp_path / "out", fused=False)
    assert (served.config._attn_implementation, plain.config._attn_implementation) == (attention.NAME, "sdpa")
    with torch.no_grad():
        torch.testing.assert_close(served(**inputs).logits, plain(**inputs).logits, rtol=1e-3, atol=1e-3)
    assert len(calls) == served.config.num_hidden_layers
    served.config.save_pretrained(tmp_path / "again")
    assert attention.NAME not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize("scheme", ["FP8", "W8A8"])
def test_a_model_that_multiplies_in_floats_keeps_their_bits(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "has_avx512", lambda: True)
    model = ZOO["bert_classifier"]()
    ds_compress.export(model, tmp_path / "out", format="torch", scheme=scheme, inputs=inputs_of(model))
    served: Any = ds_compress.from_pretrained(tmp_path / "out")
    assert (served.config._attn_implementation == attention.NAME) == (scheme == "W8A8")


def test_other_attention_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """That which a model chose, and torch's where our vectors are no wider than its."""
    monkeypatch.setattr(attention, "_ON_KERNELS", torch.nn.Module)
    monkeypatch.setattr(attention, "has_avx512", lambda: True)
    model: Any = ZOO["bert_classifier"]()
    model.set_attn_implementation("eager")
    attention.use_served_attention(model)
    assert model.config._attn_implementation == "eager"
    attention.use_served_attention(torch.nn.Linear(2, 2))
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(attention, "has_avx512", lambda: False)
    attention.use_served_attention(model)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(attention, "has_avx512", lambda: True)
    attention.use_served_attention(model)
    assert model.config._attn_implementation == attention.NAME
