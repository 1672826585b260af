"""A seeded tenth of `python -m benchmarks.reliability`; in `make test` each second trial of that."""

from __future__ import annotations

import pytest

from benchmarks.reliability.__main__ import ROWS, chosen, load, run
from tests.grids import WHOLE


@pytest.mark.parametrize("name", ROWS)
def test_a_tenth_of_a_row(name: str) -> None:
    row = load(name)
    assert name == row.NAME and row.WHAT and row.PASS
    trials = chosen(row, seed=0, tenth=True)
    results = run(trials if WHOLE else trials[::2])
    assert results
    failed = [
        f"{trial.name}: {verdict.kind} {verdict.detail}" for trial, verdict in results if not verdict.passed
    ]
    assert not failed, "\n".join(failed)
