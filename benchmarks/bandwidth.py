"""Comparing operations that are bound by memory: time, bytes per second, and what a plain copy would make of them.

Runs take turns (`timing.in_turns`); what a run needs to be fresh (`prepare`) is not timed. A run's *bytes* are those
that the operation itself has to read and write, each once. The roofline predicts that they pass at the bandwidth of
`tensor.copy_` on the same elements, which is measured in the same rounds. Freed memory stays with the process
(`keep_freed_memory`): results are allocated in every call, ours and those of the peers, and cost no page faults.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from . import record
from .timing import in_turns, ratio, seconds

COPY = "copy_"


@dataclass(frozen=True)
class Run:
    """One operation. `peer_of`: the run that it is an alternative to, whose ratio to it is reported."""

    call: Callable[[], object]
    bytes: int
    prepare: Callable[[], object] | None = None
    peer_of: str | None = None


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed. Else it hands a result's pages back to the system after one call and takes
    them anew for the next, or not, as the calls before happen to have left the heap; that costs more than a kernel.
    """
    try:
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold, most = -1, -3, 1 << 30
        libc.mallopt(mmap_threshold, most)
        libc.mallopt(trim_threshold, most)
    except (OSError, AttributeError):  # another C library: the figures are less steady
        return


def measure(
    runs: Mapping[str, Run], rounds: int, device: torch.device, threads: int
) -> dict[str, dict[str, float]]:
    """{run: {figure: value}}. One of the runs is `COPY`."""
    torch.set_num_threads(threads)

    def spent(name: str) -> float:
        run = runs[name]
        if run.prepare is not None:
            run.prepare()
        return seconds(run.call, device, threads)

    taken = in_turns(runs, spent, rounds)
    torch.set_num_threads(1)
    copy_rate = runs[COPY].bytes / statistics.median(taken[COPY])
    result: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        median = statistics.median(taken[name])
        percent = ratio([run.bytes / s for s in taken[name]], [runs[COPY].bytes / s for s in taken[COPY]])
        result[name] = {
            "ms": 1e3 * median,
            "GB/s": 1e-9 * run.bytes / median,
            "percent of copy bandwidth": 100 * percent.median,
            "roofline ms": 1e3 * run.bytes / copy_rate,
        }
        if run.peer_of is not None:
            result[name][f"times slower than {run.peer_of}"] = ratio(taken[name], taken[run.peer_of]).median
    return result


def table(result: Mapping[str, Mapping[str, float]], title: str) -> Table:
    made = Table(title=title)
    made.add_column("")
    for column in ("ms", "roofline ms", "GB/s", "% of copy", "times slower than ours"):
        made.add_column(column, justify="right")
    for name, figures in result.items():
        slower = next((value for figure, value in figures.items() if figure.startswith("times slower")), None)
        made.add_row(
            name,
            f"{figures['ms']:.3f}",
            f"{figures['roofline ms']:.3f}",
            f"{figures['GB/s']:.1f}",
            f"{figures['percent of copy bandwidth']:.0f}",
            "" if slower is None else f"{slower:.2f}",
        )
    return made


def run_benchmark(
    name: str,
    description: str,
    cases: Callable[[torch.device, bool], Mapping[str, Callable[[], Mapping[str, Run]]]],
    rounds: int,
    quick_rounds: int,
) -> None:
    """The command line of a benchmark: measures every case on every number of threads, prints and records.

    `cases(device, quick)` gives {title: a function that makes the runs}; the tensors of a case live while it runs.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: under 50 seconds")
    record.add_output_arguments(parser)
    parser.add_argument("--threads", default="1", help="for example 1,2")
    parser.add_argument("--rounds", type=int, default=rounds, help="without --quick")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    keep_freed_memory()
    device = torch.device(args.device)
    everything: dict[str, dict[str, float]] = {}
    for case, make in cases(device, args.quick).items():
        runs = make()
        for threads in map(int, args.threads.split(",")):
            where = f"{case}, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else case
            result = measure(runs, quick_rounds if args.quick else args.rounds, device, threads)
            Console(width=120).print(table(result, where))
            everything |= {f"{where}: {run}": figures for run, figures in result.items()}
    record.report(name, everything, args, essentials(everything))


def essentials(everything: record.Figures) -> record.Figures:
    """For the committed file: without what follows from a run's time and that of the copy beside it."""
    derived = ("GB/s", "roofline ms")
    return {
        variant: {figure: value for figure, value in figures.items() if figure not in derived}
        for variant, figures in everything.items()
    }
