"""What leaves an engine, and what is applied to its weights, is exact on two processes."""

from __future__ import annotations

import pytest

from tests.multirank import exactness
from tests.multirank.launch import run_ranks


@pytest.fixture(scope="module")
def differing() -> dict[str, dict[str, list[str]]]:
    results: list[dict[str, dict[str, list[str]]]] = run_ranks(
        2, "tests.multirank.exactness:differing", stage=3, names=tuple(exactness.CASES)
    )
    return results[0]


@pytest.mark.parametrize("name", exactness.CASES)
@pytest.mark.parametrize("kind", ["export", "masters", "finalize"])
def test_nothing_that_a_forward_has_rounded_leaves_the_engine(
    differing: dict[str, dict[str, list[str]]], name: str, kind: str
) -> None:
    assert differing[name][kind] == []


def test_clipping_counts_what_is_applied_on_every_stage() -> None:
    results = run_ranks(2, "tests.multirank.exactness:update_lengths", stages=(0, 1, 2, 3))
    assert results[0] == results[1]
    lengths = results[0]
    assert [length for length, _ in lengths.values()] == pytest.approx([0.01] * 4, rel=1e-3)
    norms = [norm for stage, (_, norm) in lengths.items() if stage]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-3) and norms[0] > 0.02
