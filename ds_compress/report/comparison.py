"""Several runs beside each other: what they are, and what a user has measured of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_compress.report.summary import summary


def report(
    runs: Sequence[Path], accuracy: Sequence[str] = (), latency_ms: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Of each run its summary, with "name", "accuracy" and "latency_ms"; the last two null where they are not given.

    Args:
        runs: folders, see `sources.find`.
        accuracy, latency_ms: "RUN=NUMBER", RUN as in `runs` or its last part; of a single run also "NUMBER".

    Raises:
        CheckpointError, ExportError: a file is missing or damaged.
        ValueError: a folder is no run, one is given twice, or a number is of none.
    """
    names = _names(runs)
    measured = {
        "accuracy": _by_run(accuracy, names, "--accuracy"),
        "latency_ms": _by_run(latency_ms, names, "--latency-ms"),
    }
    return [
        {"name": name, **summary(run), **{key: values.get(name) for key, values in measured.items()}}
        for name, run in names.items()
    ]


def _names(runs: Sequence[Path]) -> dict[str, Path]:
    """By the last part of the path, or by all of it where two have the same."""
    resolved = [run.resolve() for run in runs]
    if len(set(resolved)) < len(runs):
        raise ValueError("a run is given twice")
    last = [path.name or str(path) for path in resolved]
    return {str(run) if last.count(name) > 1 else name: run for run, name in zip(runs, last, strict=True)}


def _by_run(given: Sequence[str], names: Mapping[str, Path], option: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in given:
        of, separator, number = text.rpartition("=")
        if not separator:
            if len(names) > 1:
                raise ValueError(f"{option} {text}: of which run? Say RUN=NUMBER")
            of = next(iter(names))
        name = next((name for name, run in names.items() if of in (name, str(run))), None)
        if name is None:
            raise ValueError(f"{option} {text}: {of!r} is none of the runs, which are {', '.join(names)}")
        if name in found:
            raise ValueError(f"{option}: {name} has two numbers")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise ValueError(f"{option} {text}: {number!r} is no number")
    return found
