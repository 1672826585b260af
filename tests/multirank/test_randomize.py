"""A random choice by scores is one answer: on every ZeRO stage, at every world size, replayed and resumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multirank.launch import run_ranks
from tests.multirank.randomize import SEEDED, STAGES

RUNS = {1: (0,), 2: STAGES}


@pytest.fixture(scope="module")
def by_world_size(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return {
        world_size: run_ranks(
            world_size,
            "tests.multirank.randomize:everything",
            folder=str(tmp_path_factory.mktemp("checkpoints")),
            stages=stages,
        )
        for world_size, stages in RUNS.items()
    }


@pytest.mark.parametrize("name", SEEDED)
def test_the_choice_is_equal_over_stages_world_sizes_and_replays(by_world_size: Any, name: str) -> None:
    reference = by_world_size[1][0]["seeded"][name, 0]
    assert sum(int(zeros.sum()) for zeros in reference["zeros"].values()) > 1000
    for world_size, ranks in by_world_size.items():
        for stage in (*RUNS[world_size], "again"):
            got = ranks[0]["seeded"][name, stage]
            assert got["kept"] == reference["kept"], (world_size, stage)
            assert got["metrics"] == reference["metrics"], (world_size, stage)
            for weight, zeros in reference["zeros"].items():
                assert torch.equal(got["zeros"][weight], zeros), (weight, world_size, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_all_processes_share_a_secret_that_a_resumed_run_has_too(by_world_size: Any, stage: int) -> None:
    of_ranks = [rank["secret"][stage] for rank in by_world_size[2]]
    assert of_ranks[0]["seeds"] == of_ranks[1]["seeds"] == of_ranks[0]["seeds_resumed"]
    assert of_ranks[0]["seeds"].keys() == {"sparse_pruning", "row_pruning"}
    assert of_ranks[0]["seeds_of_others"] != of_ranks[0]["seeds"]
    unbroken, resumed = of_ranks[0]["losses"]
    assert resumed == unbroken
    assert of_ranks[0]["equal"]


def test_no_two_runs_have_the_same_secret(by_world_size: Any) -> None:
    drawn = [
        seed
        for ranks in by_world_size.values()
        for run in ranks[0]["secret"].values()
        for seeds in (run["seeds"], run["seeds_of_others"])
        for seed in seeds.values()
    ]
    assert len(set(drawn)) == len(drawn) == 2 * 2 * (len(RUNS[1]) + len(RUNS[2]))
