"""Small gradients arrive beside large ones: blocks end where parameters end, and small parameters travel exactly."""

from __future__ import annotations

from typing import Any

import pytest

from tests.multirank.launch import run_ranks
from tests.multirank.small_gradients import BLOCKS

KINDS = [*(name for name in BLOCKS if name != "stock"), "int4, robust"]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    result: dict[str, Any] = run_ranks(2, "tests.multirank.small_gradients:run")[0]
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_parameter_moves_as_far_as_in_stock_deepspeed(
    found: dict[str, Any], stage: int, kind: str
) -> None:
    stock = found[f"{stage} stock"]
    assert stock["before"] > 0.05, "the control: there is something to lose"
    for name, distance in found[f"{stage} {kind}"].items():
        assert distance == pytest.approx(stock[name], rel=0.1), name
