"""One thing that is tried, and what came of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Verdict:
    """passed: whether it went as promised. kind: a short word that is counted ("refused", "bit-equal", "silently
    different"). detail: what to look at when it failed."""

    passed: bool
    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Trial:
    """name: all that is varied, readable. run: is given an empty folder, and leaves no process behind."""

    name: str
    run: Callable[[Path], Verdict]


class Row(Protocol):
    """A module of this package: one row of the table. It may have a `tenth(rng)` of its own, a shorter trial."""

    NAME: str
    WHAT: str
    PASS: str

    def trials(self, rng: random.Random) -> Sequence[Trial]:
        """All trials of the row, in an order that depends on the seed alone."""
