"""The figures of runs that took turns, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from benchmarks.timing import Timing

from .jobs import Job

Figures = dict[str, dict[str, float]]
Facts = Mapping[str, Mapping[str, float]]
"""{run without its shape: {figure: value}}"""


def figures_of(job: Job, timings: Mapping[str, Timing], facts: Facts) -> Figures:
    """Of all runs of a job, shape by shape, the fastest first; compared with the fastest base if any ran."""
    figures: Figures = {}
    for shape in job.shapes:
        names = {run: run.removesuffix(f", {shape}") for run in timings if run.endswith(f", {shape}")}
        runs = sorted(names, key=lambda run: timings[run].median_cpu)
        base = next((run for run in runs if names[run] in job.bases), None)
        for run in runs:
            timing = timings[run]
            figures[run] = {"CPU ms": 1e3 * timing.median_cpu, "wall ms": 1e3 * timing.median_wall}
            if base is not None:
                times, of = job.compared
                found = job.comparison(timing, timings[base])
                figures[run] |= {
                    f"{times} as {of}": found.median,
                    f"{times}, lower quartile": found.low,
                    f"{times}, upper quartile": found.high,
                }
            figures[run] |= facts.get(names[run], {})
    return figures


def table(job: Job, figures: Figures) -> Table:
    times, of = job.compared
    has_sizes = any("bytes" in values for values in figures.values())
    shown = Table()
    shown.add_column("", no_wrap=True)
    for column in ("CPU ms", "wall ms", f"{times} as {of}", "quartiles", *(["MB"] if has_sizes else [])):
        shown.add_column(column, justify="right")
    for run, values in figures.items():
        names = (f"{times} as {of}", f"{times}, lower quartile", f"{times}, upper quartile")
        middle, low, high = (f"{values[name]:.2f}" if name in values else "" for name in names)
        cells = [run, f"{values['CPU ms']:.2f}", f"{values['wall ms']:.2f}", middle, f"{low} - {high}"]
        if has_sizes:
            cells.append(f"{values['bytes'] / 1e6:.1f}" if "bytes" in values else "")
        shown.add_row(*cells)
    return shown


def print_result(job: Job, figures: Figures) -> None:
    Console(width=120).print(table(job, figures))
