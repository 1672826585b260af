"""The recipes that are shipped: whole, valid, found by name and version."""

from __future__ import annotations

import re
from typing import Any

import pytest

import ds_compress
from ds_compress.config.recipes import find, newest
from ds_compress.config.recipes.catalog import FOLDER, STEPS
from ds_compress.config.recipes.schedule import scaled
from ds_compress.config.schema.run_length import unfinished

OF_THE_ISSUE = {
    "w8a16", "w8a8", "w4a16", "fp8", "nvfp4_qad", "mxfp4", "ternary", "sparse", "sparse_2_4", "heads_ffn", "depth_kd",
    "experts", "all_in_one", "llm", "lora", "slow_links", "bad_workers",
}  # fmt: skip


def test_every_use_has_one() -> None:
    assert set(newest()) == OF_THE_ISSUE
    assert all(re.fullmatch(r"[a-z0-9_]+@[1-9]\d*\.json", path.name) for path in FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", sorted(OF_THE_ISSUE))
def test_it_is_whole_and_needs_no_value_of_the_user(name: str) -> None:
    recipe = newest()[name]
    parsed = ds_compress.parse_config({"recipe": name})
    assert parsed.recipe == recipe.label and parsed.enabled_blocks()
    assert unfinished(parsed, STEPS) == []
    assert recipe.use.endswith(".") and recipe.does.endswith(".") and recipe.loads_in
    assert recipe.models and recipe.processes >= 1


@pytest.mark.parametrize("name", sorted(OF_THE_ISSUE - {"ternary"}))
def test_its_schedules_fit_a_short_run(name: str) -> None:
    assert unfinished(ds_compress.parse_config(scaled(newest()[name].block, 20)), 20) == []


def test_schedules_keep_their_place_in_the_run() -> None:
    shared = scaled(newest()["sparse"].block, 500)["sparse_pruning"]["shared_parameters"]
    assert (shared["schedule_offset"], shared["schedule_offset_end"], shared["schedule_offset_stride"]) == (
        25,
        300,
        25,
    )
    assert shared["dense_ratio"] == 0.5 and shared["enabled"] is True
    assert scaled({"a": {"schedule_offset": 0, "enabled": True}}, 10) == {
        "a": {"schedule_offset": 1, "enabled": True}
    }


def test_a_version_is_found() -> None:
    assert find("w4a16") == find("w4a16@1") == find(" w4a16 ")


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        ("w4a61", 'did you mean "w4a16"?'),
        ("NVFP4-QAD", 'did you mean "nvfp4_qad"?'),
        ("zzz", "--list"),
        ("w4a16@2", "last version"),
        ("w4a16@", "last version"),
        ("w4a16@one", "last version"),
        ("w4a16@¹", "last version"),
        (4, "e.g."),
        (["w4a16"], "e.g."),
        (True, "e.g."),
        ({"w4a16": 1}, "e.g."),
    ],
)
def test_an_unknown_one_is_one_problem(label: Any, hint: str) -> None:
    for block in ({"recipe": label}, {"recipe": label, "sparse_pruning": {"nonsense": 1}}):
        with pytest.raises(ds_compress.ConfigError) as error:
            ds_compress.parse_config(block)
        (problem,) = error.value.problems
        assert problem.path == "compression_training.recipe" and hint in problem.hint
        if isinstance(label, str) and "@" not in label:
            assert all(f'"{name}"' in problem.allowed for name in OF_THE_ISSUE)
