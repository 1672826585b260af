"""A save is whole or not there, in every process; a load finds damage, names it, and knows what else there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.multirank.launch import run_ranks
from tests.multirank.saving import DAMAGED, FAILURES, STAGES


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("failures")
    return run_ranks(2, "tests.multirank.saving:failures", folder=str(folder))


@pytest.fixture(scope="module")
def damages(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("damages")
    return run_ranks(2, "tests.multirank.saving:damages", folder=str(folder))


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    same = all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())
    return same and one["steps"] == other["steps"]


@pytest.mark.parametrize("what", FAILURES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_of_one_process_is_raised_in_all(failures: Any, stage: int, what: str) -> None:
    for result in failures:
        found = result[stage, what]
        assert found["error"] is not None and "No space left on device" in found["error"]
        assert "process " in found["error"] and "was not saved" in found["error"]
        assert found["hidden"] == [] and found["kept"]


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_saved_before_under_the_same_tag_is_loaded(failures: Any, stage: int) -> None:
    for result in failures:
        assert equal(result[stage]["loaded"], result[stage]["before"])
        assert result[stage]["later"].about["applied_steps"] == 3


@pytest.mark.parametrize(("stage", "what"), DAMAGED)
def test_damage_is_found_by_all_and_the_newest_whole_one_is_loaded(
    damages: Any, stage: int, what: str
) -> None:
    for rank, result in enumerate(damages):
        found = result[stage, what]
        if what == "latest":
            # The tags are whole: only the pointer is lost.
            assert found["asked"] is None and equal(found["loaded"], found["newer"])
        else:
            assert "global_step3" in found["asked"] and "load the tag 'global_step2'" in found["asked"]
            assert found["untouched"] == 0
            assert equal(found["loaded"], found["older"])
        if rank == 0:
            assert len(found["warnings"]) == 1


def test_machines_with_folders_of_their_own(tmp_path: Path) -> None:
    for rank, result in enumerate(run_ranks(2, "tests.multirank.saving:on_machines", folder=str(tmp_path))):
        for stage in STAGES:
            found = result[stage]
            assert equal(found["loaded"], found["saved"]), stage
            own = [name for name in found["files"] if name.startswith(f"stage{stage}/")]
            assert f"stage{stage}/ds_compress_manifest.json" in own and "latest" in found["files"]
            fragments = [name for name in own if "fragments" in name]
            assert fragments == [f"stage{stage}/ds_compress/fragments_{rank:05d}.safetensors"]
