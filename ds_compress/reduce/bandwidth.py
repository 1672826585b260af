"""Which of two collectives is faster here, measured: at high bandwidth quantizing costs more time than it saves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

PROBE_ELEMENTS = 1 << 21
LEAD = 5
"""So many rounds more than the other has one of the two to win; what differs clearly is decided after as many."""
MOST_ROUNDS = 25
LEAST_GAIN = 0.05
"""Share of the time that quantizing has to save: it costs precision, and less than this changes from run to run."""


@dataclass(frozen=True)
class Comparison:
    """Seconds of the slowest process, medians over rounds: DeepSpeed's collective, and the quantized one.

    ratio: median of quantized / plain in one round, where both met the same traffic.
    """

    plain: float
    quantized: float
    ratio: float
    plain_bytes: int
    rounds: int

    @classmethod
    def of(cls, times: list[tuple[float, float]], plain_bytes: int) -> Comparison:
        """times: of each round, plain and quantized."""
        plain, quantized = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(ours / theirs for theirs, ours in times)
        return cls(plain, quantized, ratio, plain_bytes, len(times))

    @property
    def is_worthwhile(self) -> bool:
        return is_won(self.ratio)

    @property
    def megabits(self) -> float:
        """The bandwidth that the plain collective reached, Mbit/s per process."""
        return self.plain_bytes * 8e-6 / self.plain

    def __str__(self) -> str:
        return (
            f"{PROBE_ELEMENTS:,} elements take {self.plain * 1e3:.1f} ms as DeepSpeed sends them "
            f"({self.megabits:,.0f} Mbit/s) and {self.quantized * 1e3:.1f} ms quantized, in {self.rounds} rounds"
        )

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Comparison:
        """What `state` was made from."""
        return cls(**state)


def is_won(ratio: float) -> bool:
    """Whether quantizing gains enough where it takes `ratio` times as long."""
    return ratio < 1 - LEAST_GAIN


def compare(
    plain: Callable[[], object],
    quantized: Callable[[], object],
    group: Any,
    device: torch.device,
    plain_bytes: int,
) -> Comparison:
    """Times both in turns, after one warm-up round, until one leads; the same result in every process.

    plain_bytes: what the plain collective sends from each process.
    """
    times: list[tuple[float, float]] = []
    for round_number in range(-1, MOST_ROUNDS):
        # Who begins changes: the second meets warm caches, or what the first has left in buffers.
        if round_number % 2:
            ours, theirs = _seconds(quantized, group, device), _seconds(plain, group, device)
        else:
            theirs, ours = _seconds(plain, group, device), _seconds(quantized, group, device)
        slowest = torch.tensor([theirs, ours], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
        if round_number >= 0:
            times.append((slowest[0].item(), slowest[1].item()))
        won = sum(is_won(ours / theirs) for theirs, ours in times)
        if abs(won - (len(times) - won)) >= LEAD:
            break
    return Comparison.of(times, plain_bytes)


def _seconds(run: Callable[[], object], group: Any, device: torch.device) -> float:
    dist.barrier(group)
    _finish(device)
    begin = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - begin


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
