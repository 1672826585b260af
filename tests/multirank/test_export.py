"""Exports from ZeRO-2 and ZeRO-3 engines on two processes, and from their checkpoints on one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.multirank import exporting
from tests.multirank.launch import run_ranks

SCENARIO = "tests.multirank.exporting:"
STAGES = (2, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    names = tuple(exporting.SCENARIOS)
    folder = str(tmp_path_factory.mktemp("exports"))
    return {
        stage: run_ranks(2, SCENARIO + "exported", stage=stage, names=names, folder=folder)[0]
        for stage in STAGES
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", exporting.SCENARIOS)
class TestEngine:
    def test_is_checked_and_sharded(self, results: dict[int, Any], stage: int, name: str) -> None:
        result = results[stage][name]
        assert result["report"].check["verdict"]
        assert result["shards"] > (name == "hf")

    def test_checkpoint_gives_the_same_tensors(self, results: dict[int, Any], stage: int, name: str) -> None:
        if not exporting.SCENARIOS[name][1]:
            pytest.skip("a run without a block has no sidecar")
        assert results[stage][name]["different"] == []
        assert results[stage][name]["again"].check["verdict"]


def test_a_refusal_is_raised_by_every_process_and_leaves_nothing() -> None:
    messages = run_ranks(2, SCENARIO + "refused_everywhere", stage=3)
    assert all("asymmetric" in message and "encoder.layer.0" in message for message in messages)
