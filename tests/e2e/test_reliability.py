"""A seeded tenth of `python -m benchmarks.reliability`."""

from __future__ import annotations

import pytest

from benchmarks.reliability.__main__ import ROWS, chosen, load, run


@pytest.mark.parametrize("name", ROWS)
def test_a_tenth_of_a_row(name: str) -> None:
    row = load(name)
    assert name == row.NAME and row.WHAT and row.PASS
    results = run(chosen(row, seed=0, tenth=True))
    assert results
    failed = [
        f"{trial.name}: {verdict.kind} {verdict.detail}" for trial, verdict in results if not verdict.passed
    ]
    assert not failed, "\n".join(failed)
