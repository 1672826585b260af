"""Several pieces of one collective under way at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

IN_FLIGHT = 3
"""Pieces that may be on the wire at once: enough to keep a link busy, few enough that buffers stay small."""

StartedT = TypeVar("StartedT")


def pipelined(
    pieces: Iterable[int],
    start: Callable[[int], StartedT],
    finish: Callable[[int, StartedT], Any],
    in_flight: int = IN_FLIGHT,
) -> None:
    """Calls `start(i)` and later `finish(i, what start returned)` for each piece, at most `in_flight` apart.

    `start` prepares a piece and puts it on the wire without waiting; `finish` waits for it and works on it, while the
    pieces started after it travel. Every process makes the same calls in the same order.
    """
    under_way: deque[tuple[int, StartedT]] = deque()
    for piece in pieces:
        under_way.append((piece, start(piece)))
        if len(under_way) >= in_flight:
            finish(*under_way.popleft())
    while under_way:
        finish(*under_way.popleft())
