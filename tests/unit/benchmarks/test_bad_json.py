"""Row R5 of `benchmarks.reliability`: what it calls a fault, and a hundredth of it."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ds_compress
from benchmarks.reliability import bad_json
from ds_compress.errors import ConfigError, Problem

TRIALS = bad_json.trials(random.Random("R5 0"))
BY_HAND = [trial for trial in TRIALS if not trial.name.startswith("mutation")]


def refuse(path: str) -> None:
    raise ConfigError([Problem(path, "got", "allowed")])


def test_it_has_as_many_as_it_says() -> None:
    assert len(BY_HAND) > 60 and len(TRIALS) == len(BY_HAND) + 10_000
    assert len({trial.name for trial in TRIALS}) == len(TRIALS)
    assert len(bad_json.sources()) > 30


@pytest.mark.parametrize("trial", BY_HAND, ids=lambda trial: trial.name)
def test_by_hand(trial: Any, tmp_path: Path) -> None:
    verdict = trial.run(tmp_path)
    assert verdict.passed, verdict


@pytest.mark.parametrize("trial", TRIALS[len(BY_HAND) :: 100], ids=lambda trial: trial.name)
def test_by_chance(trial: Any, tmp_path: Path) -> None:
    verdict = trial.run(tmp_path)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: None, "accepted"),
        (partial(refuse, "compression_training.seed"), "refused"),
        (partial(refuse, "compression_training"), "refused without a place"),
        (partial(refuse, "elsewhere"), "refused without a place"),
        (lambda: {}["key"], "another error"),
        (lambda: sum(range(200_000_000)), "slow"),
    ],
)
def test_what_is_a_fault(call: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_json, "LONGEST_S", 0.1)
    block = {"seed": 5}
    verdict = bad_json.judged([call], lambda path: bad_json._below_root(path, block))
    assert verdict.kind == kind
    assert verdict.passed == (kind in ("accepted", "refused"))


def test_mutations_are_those_of_the_seed(tmp_path: Path) -> None:
    def first(seed: str) -> list[Any]:
        return [trial.run for trial in bad_json.trials(random.Random(seed))[-3:]]

    assert first("R5 0") == first("R5 0") != first("R5 1")


def test_the_sources_are_valid() -> None:
    for name, block in bad_json.sources():
        ds_compress.parse_config(block), name
