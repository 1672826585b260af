"""A universal checkpoint is loaded where it was made: bit for bit what a plain load would have been."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_compress
from tests.multirank.launch import run_ranks
from tests.multirank.universal import AFTER, BEFORE, CASES, STAGES

SCENARIO = "tests.multirank.universal:"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("universal")
    saved = run_ranks(2, SCENARIO + "save", folder=str(folder))
    for name in CASES:
        for stage in STAGES:
            ds_compress.to_universal(folder / f"{name}-{stage}", folder / f"{name}-{stage}")
    return saved, run_ranks(2, SCENARIO + "load", folder=str(folder))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_bit_for_bit(runs: Any, name: str, stage: int) -> None:
    for saved, loaded in zip(*runs, strict=True):
        unbroken, resumed = saved[name, stage], loaded[name, stage]
        assert resumed["applied"] == BEFORE + AFTER
        assert resumed["losses"] == unbroken["losses"]
        for key, value in unbroken["weights"].items():
            assert torch.equal(resumed["weights"][key], value), key
