"""Comparing the times of several things on a machine that is never quite idle.

All of them take turns in one process, in another order every round, so that a slow minute is slow for all.
Each is compared with the base of its own round, and the median over rounds is reported with its quartiles.
The CPU time of the process decides, since it sees little of what else the machine does; wall time is beside.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass
class Timing:
    """Seconds of CPU time and of wall time, one of each per round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)

    @property
    def median_wall(self) -> float:
        return statistics.median(self.wall)


@dataclass(frozen=True)
class Ratio:
    """A median over rounds and its lower and upper quartile."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    progress: Callable[[str], object] | None = None,
) -> dict[str, Timing]:
    """Times every run once per round, after `warm_up` rounds that are not counted; see `in_turns`."""
    taken = in_turns(runs, lambda name: measured(runs[name]), rounds, warm_up, progress)
    return {
        name: Timing([cpu for cpu, _ in times], [wall for _, wall in times]) for name, times in taken.items()
    }


def in_turns(
    names: Iterable[str],
    measure: Callable[[str], T],
    rounds: int,
    warm_up: int = 1,
    progress: Callable[[str], object] | None = None,
) -> dict[str, list[T]]:
    """measure(name) of every name once per round, {name: one result a round}, after `warm_up` rounds.

    Each round starts at another name, so none always follows the same neighbour's cache misses. `progress` is
    told each name before its turn.
    """
    names = list(names)
    results: dict[str, list[T]] = {name: [] for name in names}
    for round_number in range(-warm_up, rounds):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            if progress is not None:
                progress(name)
            result = measure(name)
            if round_number >= 0:
                results[name].append(result)
    return results


def seconds(call: Callable[[], object], device: torch.device, threads: int, repeat: int = 1) -> float:
    """Of one call, the mean of `repeat`: on one thread the CPU time of the process, which sees little of what else the
    machine does; on more, time that passes; on CUDA, time between two events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeat):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeat
    clock = time.process_time if threads == 1 else time.perf_counter
    begin = clock()
    for _ in range(repeat):
        call()
    return (clock() - begin) / repeat


def measured(run: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds of this process with all its threads, wall seconds) of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def ratio(values: Sequence[float], base: Sequence[float]) -> Ratio:
    """The median over rounds of values[i] / base[i], with its quartiles; raises ValueError without rounds."""
    ratios = [value / reference for value, reference in zip(values, base, strict=True)]
    if not ratios:
        raise ValueError("a ratio needs at least one round")
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)
