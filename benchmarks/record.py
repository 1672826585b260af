"""Every figure that a benchmark measured, with what it was measured on.

With `--record` they are appended to a CSV of the benchmark's own: one line is one figure: when, which commit, which CPU
and versions, how it was called, then variant, figure and value. The files in `benchmarks/results` are committed, bad
figures included. Without it a benchmark writes no file.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
COLUMNS = ("time", "commit", "cpu", "cores", "versions", "arguments", "variant", "figure", "value")

Figures = Mapping[str, Mapping[str, float]]
"""{variant: {figure: value}}; a figure's name ends in its unit where it has one."""


RESULTS = HERE / "results"


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --json and --record, which `report` reads."""
    parser.add_argument("--json", action="store_true", help="one last line with every figure")
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="FOLDER",
        help=f"append the figures to a CSV in FOLDER (without one: {RESULTS.parent.name}/{RESULTS.name})",
    )


def report(
    benchmark: str, figures: Figures, args: argparse.Namespace, recorded: Figures | None = None
) -> None:
    """Prints and records as the arguments ask for; `recorded`: what is recorded, where that is less than everything."""
    if args.record is not None:
        arguments = " ".join(a for a in sys.argv[1:] if a not in ("--record", str(args.record)))
        path = append(benchmark, arguments, figures if recorded is None else recorded, args.record)
        print(f"appended to {path}")
    if args.json:
        print(json_line(benchmark, figures))


def append(benchmark: str, arguments: str, figures: Figures, folder: Path = RESULTS) -> Path:
    """Appends all figures of one run to `<folder>/<benchmark>.csv` and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}.csv"
    where = conditions()
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for variant, values in figures.items():
            for figure, value in values.items():
                writer.writerow([*where.values(), arguments, variant, figure, f"{value:.6g}"])
    return path


def conditions() -> dict[str, str]:
    """time (UTC), commit, CPU model, cores and the versions that matter.

    The commit has a "+" when the tree has changes; of a copy, $BENCHMARK_COMMIT may name it.
    """
    packages = ("torch", "deepspeed", "transformers")
    versions = [f"python {platform.python_version()}", *(f"{name} {_version(name)}" for name in packages)]
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
        # Results are appended while a benchmark runs; they do not change what was measured.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def instruction_set() -> str:
    """What the CPU kernels run on, as csrc/cpu/isa.cpp chooses: `DS_COMPRESS_CPU_ISA`, else the best there is."""
    wish = os.environ.get("DS_COMPRESS_CPU_ISA")
    flags = _cpu_flags()
    return wish or ("avx512" if "avx512_vnni" in flags else "avx2" if "avx2" in flags else "scalar")


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
