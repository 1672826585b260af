"""Several chunks of one collective in flight at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

IN_FLIGHT = 3
"""Chunks that are in flight at once: enough to use the bandwidth, few enough that buffers stay small."""

StartedT = TypeVar("StartedT")


def pipelined(
    chunks: Iterable[int],
    start: Callable[[int], StartedT],
    finish: Callable[[int, StartedT], Any],
    in_flight: int = IN_FLIGHT,
) -> None:
    """Calls `start(i)` and later `finish(i, what start returned)` for each chunk, at most `in_flight` apart.

    `start` prepares a chunk and sends it without waiting; `finish` waits for it and processes it, while the chunks
    started after it are in flight. Every process makes the same calls in the same order.
    """
    started: deque[tuple[int, StartedT]] = deque()
    for chunk in chunks:
        started.append((chunk, start(chunk)))
        if len(started) >= in_flight:
            finish(*started.popleft())
    while started:
        finish(*started.popleft())
