"""Every kind of layer, pruned and quantized at once, gives one answer on every ZeRO stage."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.multirank.architectures import MODELS, STAGES
from tests.multirank.launch import run_ranks


@pytest.fixture(scope="module")
def results() -> Any:
    return run_ranks(2, "tests.multirank.architectures:all_of_them")[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stages_agree(results: Any, name: str, dtype: str) -> None:
    reference = results[name, 0, dtype]
    for stage in STAGES[1:]:
        got = results[name, stage, dtype]
        torch.testing.assert_close(
            got["losses"], reference["losses"], rtol=1e-4 if dtype == "fp32" else 2e-2, atol=1e-4
        )
        if dtype == "fp32":
            assert all(torch.equal(got["alive"][k], v) for k, v in reference["alive"].items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_global_density_is_exact(results: Any, name: str, stage: int, dtype: str) -> None:
    alive = results[name, stage, dtype]["alive"].values()
    assert sum(int(a.sum()) for a in alive) == math.ceil(0.5 * sum(a.numel() for a in alive))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", STAGES)
def test_exported_weights_have_few_values(results: Any, name: str, stage: int) -> None:
    result = results[name, stage, "fp32"]
    assert result["bits"] == 4
    for weight in result["alive"]:
        exported = result["exported"][weight]
        channels = exported if "c_" not in weight else exported.t()
        for channel in channels.reshape(channels.shape[0], -1):
            assert len(channel.unique()) <= 15, weight
