"""Rows of `benchmarks/results` as the cells of a table, and how they were measured."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence

from . import record

AVX512, AVX2, TILES = "avx512", "avx2", "amx_int8"

Lines = list[str]


class FigureError(ValueError):
    """A page asks for a table that there is not, or a table for a figure that was not measured."""


class Results:
    """The figures of one benchmark; `machine`: part of the CPU's label, `setting`: part of the arguments.

    AVX512 is a machine without TILES, which do the same work in other times.
    """

    def __init__(self, benchmark: str, machine: str = "", setting: str = "") -> None:
        self.benchmark = benchmark
        rows = record.read(record.RESULTS / f"{benchmark}.csv")
        rows = [r for r in rows if machine in r["cpu"] and setting in r["arguments"]]
        if machine == AVX512:
            rows = [r for r in rows if TILES not in r["cpu"]]
        self.rows = sorted(rows, key=lambda row: row["time"])
        self._used: dict[tuple[str, ...], None] = {}

    def value(self, variant: str, figure: str) -> float:
        """The newest one.

        Raises:
            FigureError: there is none.
        """
        for row in reversed(self.rows):
            if (row["variant"], row["figure"]) == (variant, figure):
                self._used[self._how(row)] = None
                return float(row["value"])
        raise FigureError(f"{self.benchmark}.csv has no {figure!r} of {variant!r}")

    def variants(self, ending: str = "") -> list[str]:
        return list(dict.fromkeys(row["variant"] for row in self.rows if row["variant"].endswith(ending)))

    def sources(self, title: str = "") -> Lines:
        """How the figures that were asked for were measured: the commands, then what they ran on."""
        by_machine: dict[tuple[str, ...], list[str]] = {}
        for command, *where in self._used:
            by_machine.setdefault(tuple(where), []).append(f"`{command}`")
        return [f"{title}{', '.join(commands)}; {'; '.join(where)}" for where, commands in by_machine.items()]

    def _how(self, row: record.Row) -> tuple[str, ...]:
        options = re.split(r" (?=--)", record.setting_of(row["arguments"]))
        pairs = [part for option in options for part in option.split(" ", 1) if part]
        command = f"python -m benchmarks.{self.benchmark} {shlex.join(pairs)}".strip()
        versions = ", ".join(v for v in row["versions"].split(", ") if not v.startswith("python"))
        day = row["time"].partition("T")[0]
        gone = " (no longer in the history)" if record.is_gone(row["commit"]) else ""
        return (
            command,
            f"{row['cpu']}, {row['cores']} cores",
            versions,
            f"commit {row['commit']}{gone}, {day}",
        )


def markdown(
    head: Sequence[str], rows: Iterable[Sequence[str]], sources: Callable[[], Iterable[str]]
) -> Lines:
    """A table, the first column to the left and numbers to the right; below it `sources`, once the rows are made."""
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return [*lines, "", "<small>" + ".<br>\n".join(sources()) + ".</small>"]
