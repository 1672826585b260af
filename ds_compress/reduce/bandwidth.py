"""Which of two collectives is faster here, measured: at high bandwidth quantizing costs more time than it saves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

PROBE_ELEMENTS = 1 << 21
ROUNDS = 3


@dataclass(frozen=True)
class Comparison:
    """Median seconds of the slowest process: DeepSpeed's collective, and the quantized one."""

    plain: float
    quantized: float
    plain_bytes: int

    @property
    def is_worthwhile(self) -> bool:
        return self.quantized < self.plain

    @property
    def megabits(self) -> float:
        """The bandwidth that the plain collective reached, Mbit/s per process."""
        return self.plain_bytes * 8e-6 / self.plain

    def __str__(self) -> str:
        return (
            f"{PROBE_ELEMENTS:,} elements take {self.plain * 1e3:.1f} ms as DeepSpeed sends them "
            f"({self.megabits:,.0f} Mbit/s) and {self.quantized * 1e3:.1f} ms quantized"
        )


def compare(
    plain: Callable[[], object],
    quantized: Callable[[], object],
    group: Any,
    device: torch.device,
    plain_bytes: int,
    rounds: int = ROUNDS,
) -> Comparison:
    """Times both in turns, after one warm-up round; the same result in every process.

    plain_bytes: what the plain collective sends from each process.
    """
    times: dict[Callable[[], object], list[float]] = {plain: [], quantized: []}
    for round_number in range(-1, rounds):
        for run, taken in times.items():
            dist.barrier(group)
            _finish(device)
            begin = time.perf_counter()
            run()
            _finish(device)
            if round_number >= 0:
                taken.append(time.perf_counter() - begin)
    medians = torch.tensor([statistics.median(taken) for taken in times.values()], device=device)
    dist.all_reduce(medians, dist.ReduceOp.MAX, group)
    slowest = medians.tolist()
    return Comparison(slowest[0], slowest[1], plain_bytes)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
