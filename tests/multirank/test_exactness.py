"""Exports and finalized models are the fp32 masters, also right after forwards that make weights whole in 16 bits."""

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
