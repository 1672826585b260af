"""What is measured: each job is a group of peers that take turns, and how their times are compared."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import Ratio, Timing, ratio

from . import encoder, training


@dataclass(frozen=True)
class Job:
    """Attributes:
    peers: {module: environment}.
    shapes: what a run's name ends with; runs of one shape are compared.
    bases: the runs, without shape, of which the fastest is the base.
    compared: ("times as fast" or "times as long", what the base is called).
    prepare: writes to a folder what the peers start from.
    """

    peers: dict[str, str]
    shapes: Collection[str]
    bases: Collection[str]
    compared: tuple[str, str]
    prepare: Callable[[Path], None]

    def comparison(self, run: Timing, base: Timing) -> Ratio:
        """Of CPU times, per round."""
        if self.compared[0] == "times as long":
            return ratio(run.cpu, base.cpu)
        return ratio(base.cpu, run.cpu)


JOBS = {
    "encoder": Job(
        encoder.PEERS,
        encoder.SHAPES,
        encoder.UNQUANTIZED,
        ("times as fast", "the best unquantized"),
        encoder.prepare,
    ),
    "training": Job(
        training.PEERS,
        (training.SHAPE,),
        training.UNQUANTIZED,
        ("times as long", "the fastest unquantized in fp32"),
        training.prepare,
    ),
}
