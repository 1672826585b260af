"""A plan says of a mixture of experts what is resident and what of it one token needs."""

from __future__ import annotations

from typing import Any

import pytest

import ds_compress
from ds_compress.config.report import size_estimate
from ds_compress.modelinfo.experts import experts_per_token, moe_blocks
from tests.models import tiny_bert
from tests.zoo.mixtures import ARCHITECTURES, mixture

HALF_OF_EXPERTS: dict[str, Any] = {
    "expert_pruning": {"shared_parameters": {"enabled": True, "dense_ratio": 0.5, "method": "l2"}}
}
NOTHING: dict[str, Any] = {"sparse_pruning": {"shared_parameters": {"enabled": True, "dense_ratio": 1.0}}}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_how_many_experts_see_a_token_is_known(name: str) -> None:
    for block in moe_blocks(mixture(name)):
        assert experts_per_token(block) == (1 if name == "llama4" else 2)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "jamba"])
def test_active_is_what_one_token_needs(name: str) -> None:
    model = mixture(name)
    parts = size_estimate.total(size_estimate.stored(ds_compress.plan(model, NOTHING)).values())
    experts = sum(4 * p.numel() for key, p in model.named_parameters() if ".experts." in key)
    (shares,) = {2 / block.experts for block in moe_blocks(model)}
    assert parts.active_before == parts.active_after == parts.before - experts * (1 - shares)


def test_removed_experts_make_it_smaller_and_no_token_cheaper() -> None:
    plan = ds_compress.plan(mixture("mixtral"), HALF_OF_EXPERTS)
    parts = size_estimate.total(size_estimate.stored(plan).values())
    rows_of_routers = 2 * 2 * 16 * 4
    assert parts.active_before - parts.active_after == rows_of_routers
    assert parts.after < 0.7 * parts.before
    assert "active: 35.6 kB -> 35.4 kB" in str(plan)


def test_dense_models_and_unknown_mixtures_have_no_such_line() -> None:
    assert "active:" not in str(ds_compress.plan(tiny_bert(), NOTHING))
    assert "active:" not in str(ds_compress.plan(mixture("stranger"), HALF_OF_EXPERTS))
