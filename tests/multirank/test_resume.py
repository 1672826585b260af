"""A resumed run is the unbroken one bit for bit: every block, saved before, on or after its ramp, stages in turn."""

from __future__ import annotations

from typing import Any

import pytest

from ds_compress.engine.teachers.identity import identity
from tests.multirank.launch import run_ranks
from tests.multirank.resume import RUNS, STEPS, teacher_of_more

SCENARIO = "tests.multirank.resume:"
NAMES = tuple(RUNS)
RESUMED = [(name, stage, at) for name, runs in RUNS.items() for stage, saves in runs.items() for at in saves]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """What the unbroken runs end with, and the resumed ones, by process."""
    folder = str(tmp_path_factory.mktemp("resumed"))
    unbroken: list[Any] = [{}, {}]
    resumed: list[Any] = [{}, {}]
    # A launch trains a third of them: it must end within the time that a test has.
    for part in (NAMES[0::3], NAMES[1::3], NAMES[2::3]):
        for scenario, results in (("unbroken", unbroken), ("resumed", resumed)):
            for rank, more in enumerate(run_ranks(2, SCENARIO + scenario, folder=folder, names=part)):
                results[rank].update(more)
    return unbroken, resumed


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("name", "stage", "at"), RESUMED)
def test_a_resumed_run_ends_bit_equal(found: Any, name: str, stage: int, at: int) -> None:
    for rank in (0, 1):
        unbroken, resumed = found[0][rank][name, stage], found[1][rank][name, stage, at]
        micro_steps = len(unbroken["losses"]) // STEPS
        assert resumed["losses"] == unbroken["losses"][at * micro_steps :]
        for part in ("weights", "masters", "kept", "state", "teacher", "process"):
            differ = {key for key, value in unbroken[part].items() if resumed[part].get(key) != value}
            assert not differ and resumed[part].keys() == unbroken[part].keys(), part


@pytest.mark.timeout(1500)
def test_the_runs_are_what_they_claim_to_be(found: Any) -> None:
    """They train, their teacher is known whatever its shards, and what a link was found to be is kept."""
    unbroken = found[0][0]
    assert all(len(set(result["losses"])) > 1 for result in unbroken.values())
    for stage in RUNS["distillation"]:
        result = unbroken["distillation", stage]
        known = result["state"]["/stages/distillation/teacher"], result["teacher"]["identity"]
        assert known == (repr(identity(teacher_of_more())), identity(teacher_of_more())), "of any shards"
    for stage in RUNS["measured link"]:
        state = unbroken["measured link", stage]["state"]
        assert state["/stages/gradient_reduction/link/ratio"] == "0.5", "what the first launch has measured"
