"""Every figure that a benchmark measured, with what it was measured on.

With `--record` a run writes its figures to a CSV of the benchmark's own: one line is one figure: when, which commit,
which CPU and versions, how it was called, then variant, figure and value. The files in `benchmarks/results` are
committed, bad figures included. Without it a benchmark writes no file.

A line is known by its machine (CPU and cores), setting, variant and figure, and a new one takes the place of the line
that it repeats: so a file holds the newest figure of each machine, with its commit, and a run that is done again after
a change shows as a diff of values. The setting is the arguments without those that say only where files lie, how often
something is measured or on how many threads (which is part of the variant). `git log -p` has what was there before.

    python -m benchmarks.record        thins every file of benchmarks/results in this sense, after a merge for example

`benchmarks.figures` writes the tables of the docs from these files.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
COLUMNS = ("time", "commit", "cpu", "cores", "versions", "arguments", "variant", "figure", "value")

Row = Mapping[str, str]

Figures = Mapping[str, Mapping[str, float]]
"""{variant: {figure: value}}; a figure's name ends in its unit where it has one."""

_FLAGS_OF_NO_SETTING = ("--json", "--measure-only", "--picture")
_OPTIONS_OF_NO_SETTING = ("--output", "--record", "--rounds", "--teacher", "--threads")

RESULTS = HERE / "results"
GONE = frozenset({"30d7abacaca7", "9a3cfd3eaee9", "fe9ac31edaa1", "ff2b4d40c544"})
"""Commits that were rebased away after something was measured on them. A test keeps them from becoming more, and the
docs say so beside the figure."""


def is_gone(commit: str) -> bool:
    """Whether nobody can check out any more what a row says that it was measured on."""
    return commit.removesuffix("+") in GONE


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --json and --record, which `report` reads."""
    parser.add_argument("--json", action="store_true", help="one last line with every figure")
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="FOLDER",
        help=f"write the figures to a CSV in FOLDER (without one: {RESULTS.parent.name}/{RESULTS.name})",
    )


def report(
    benchmark: str,
    figures: Figures,
    args: argparse.Namespace,
    recorded: Figures | None = None,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Prints and records as the arguments ask for.

    recorded: what is recorded, where that is less than everything. versions: of packages in other environments.
    """
    if args.record is not None:
        arguments = " ".join(_without_places(sys.argv[1:], str(args.record)))
        path = write(benchmark, arguments, figures if recorded is None else recorded, args.record, versions)
        print(f"written to {path}")
    if args.json:
        print(json_line(benchmark, figures))


def _without_places(given: Sequence[str], recorded: str) -> Iterator[str]:
    """The arguments without folders of the machine, which say nothing about a figure."""
    words = iter(given)
    for word in words:
        if word in ("--output", "--teacher"):
            next(words, None)
        elif word == "--llama-cpp":
            next(words, None)
            yield from (word, "PYTHON")
        elif word not in ("--record", recorded):
            yield word


def write(
    benchmark: str,
    arguments: str,
    figures: Figures,
    folder: Path = RESULTS,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Writes all figures of one run to `<folder>/<benchmark>.csv`, in place of those that they repeat; its path."""
    path, where = folder / f"{benchmark}.csv", conditions(versions)
    rows = [
        {**where, "arguments": arguments, "variant": variant, "figure": figure, "value": f"{value:.6g}"}
        for variant, values in figures.items()
        for figure, value in values.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    _store(path, thinned([*(read(path) if path.exists() else ()), *rows]))
    return path


def read(path: Path) -> list[dict[str, str]]:
    """The lines of one file, by `COLUMNS`."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def thinned(rows: Iterable[Row]) -> list[Row]:
    """The newest of the rows that repeat each other, each in the place of the first."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        other = newest.get(key_of(row))
        if other is None or row["time"] >= other["time"]:
            newest[key_of(row)] = row
    return list(newest.values())


def key_of(row: Row) -> tuple[str, ...]:
    """What makes a row a repetition of another; see the module."""
    return row["cpu"], row["cores"], setting_of(row["arguments"]), row["variant"], row["figure"]


def setting_of(arguments: str) -> str:
    """The arguments that change what a figure means."""
    words, kept = iter(arguments.split()), []
    for word in words:
        if word in _OPTIONS_OF_NO_SETTING:
            next(words, None)
        elif word not in _FLAGS_OF_NO_SETTING:
            kept.append(word)
    return " ".join(kept)


def _store(path: Path, rows: Iterable[Row]) -> None:
    """A reader sees the old file or the new one, never half of it."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def conditions(others: Mapping[str, str] | None = None) -> dict[str, str]:
    """time (UTC), commit, CPU model, cores and the versions that matter; `others`: of packages that are not here.

    The commit has a "+" when the tree has changes; of a copy, $BENCHMARK_COMMIT may name it.
    """
    used = [name for name in ("onnxruntime", "openvino", "nncf") if name in sys.modules]
    named = {name: _version(name) for name in ("torch", "deepspeed", "transformers", *used)} | dict(
        others or {}
    )
    versions = [
        f"python {platform.python_version()}",
        *(f"{name} {version}" for name, version in named.items()),
    ]
    return {
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "versions": ", ".join(versions),
    }


def json_line(benchmark: str, figures: Figures) -> str:
    """Everything as one line of JSON, for `--json`."""
    return json.dumps({"benchmark": benchmark, **conditions(), "figures": figures})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True
        ).stdout

    if named := os.environ.get("BENCHMARK_COMMIT"):
        return named
    try:
        # Results are written while a benchmark runs; they do not change what was measured.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def instruction_set() -> str:
    """What the CPU kernels run on, as csrc/cpu/isa.cpp chooses: `DS_COMPRESS_CPU_ISA`, else the best there is."""
    named = os.environ.get("DS_COMPRESS_CPU_ISA")
    flags = _cpu_flags()
    return named or ("avx512" if "avx512_vnni" in flags else "avx2" if "avx2" in flags else "scalar")


def _cpu_model() -> str:
    """Model, instruction set of the kernels, and what else of the CPU speeds up what they are compared with."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    special = [flag for flag in ("avx512_bf16", "amx_int8") if flag in _cpu_flags()]
    return ", ".join([names[0] if names else platform.machine(), instruction_set(), *special])


def _cpu_flags() -> set[str]:
    return set(next((line for line in _cpuinfo() if line.startswith("flags")), "").split())


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def main() -> None:
    for path in sorted(RESULTS.glob("*.csv")):
        rows = read(path)
        _store(path, thinned(rows))
        print(f"{path.name}: {len(rows)} -> {len(thinned(rows))} figures")


if __name__ == "__main__":
    main()
