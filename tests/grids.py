"""Grids of cases: whole in `make test-all`; in `make test` each case meets some of the values, in turn.

A run for each combination of architecture, block, ZeRO stage and moment takes hours, while what breaks is nearly always
one value or a pair of them (Kuhn, Wallace and Gallo 2004, "Software Fault Interactions and Implications for Software
Testing"). Taking turns leaves every case, every value of every other axis, and most of their pairs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value")
WHOLE = os.environ.get("DS_COMPRESS_TESTS") == "all"


def in_turn(values: Sequence[Value], case: int, count: int = 1, whole: bool = WHOLE) -> tuple[Value, ...]:
    """All `values`, or `count` of them for the case of that number, far from each other; the next case has the next."""
    if whole or len(values) <= count:
        return tuple(values)
    places = {(case + turn * len(values) // count) % len(values) for turn in range(count)}
    return tuple(values[place] for place in sorted(places))
