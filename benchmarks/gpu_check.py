"""Checks this package on a machine with a GPU, in minutes and without a network.

    python -m benchmarks.gpu_check [--minutes 8] [--record | --output FILE] [--only products,tests] [--dry-run]

It builds the library, measures what the device reaches in torch, then our products and elementwise kernels, runs the
tests that need a device, and takes whole training steps. Each part is a process of its own with a time limit; one that
dies or hangs is recorded as such, with what it had measured, and the next one starts. Time that a part leaves over goes
to the next. The JSON file is written anew after each part. `--record` puts it into benchmarks/results/gpu.

`--dry-run` runs the same code with tiny sizes on the CPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import gpu_ceilings, gpu_goals, record
from .gpu_parts import ABSENT, PARTS, Part, write_json

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.0
LEAST_S = 5.0  # a part with less time than this is not started
STATUS = {0: "done", ABSENT: "absent"}  # by exit status; any other: "failed"
OUTPUT_KEPT = 3000  # characters of the end of a part's output, when it did not end well


@dataclass(frozen=True)
class Outcome:
    """How one part went. `status`: "done", "failed", "out of time", "absent" or "no time left"."""

    status: str
    seconds: float
    limit: float
    figures: dict[str, dict[str, float]]
    output: str = ""

    def as_json(self) -> dict[str, Any]:
        told = {"status": self.status, "seconds": round(self.seconds, 1), "limit s": round(self.limit, 1)}
        told |= {"figures": self.figures}
        return told | ({"output": self.output} if self.output else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything together")
    parser.add_argument("--only", default="", help=f"of {', '.join(part.name for part in PARTS)}")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--record", action="store_true", help="the JSON goes to benchmarks/results/gpu")
    where.add_argument("--output", type=Path, default=Path("gpu-check.json"), help="the JSON's path")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on the device, too")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    args = parser.parse_args()
    wanted = [name for name in args.only.split(",") if name]
    unknown = set(wanted) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    parts = [part for part in PARTS if not wanted or part.name in wanted]
    device = "cpu" if args.dry_run else "cuda"
    about = describe(device)
    path = record_path(about) if args.record else args.output
    result = check(parts, device, args.quick or args.dry_run, 60 * args.minutes, path, about)
    Console(width=150).print(*tables(result))
    print(f"everything is in {path}")
    if any(part["status"] != "done" for part in result["parts"].values()):
        sys.exit(1)


def check(
    parts: Sequence[Part], device: str, quick: bool, seconds: float, path: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Runs `parts` in order within `seconds`; `path` holds the result so far from the start on."""
    end = time.monotonic() + seconds
    scale = seconds / sum(part.seconds for part in parts)
    result: dict[str, Any] = {**about, "quick": quick, "minutes": seconds / 60, "parts": {}, "goals": []}
    write_json(path, result)
    for index, part in enumerate(parts):
        kept_for_later = scale * sum(later.seconds for later in parts[index + 1 :])
        limit = end - time.monotonic() - kept_for_later
        print(f"{part.name}: {part.what} (up to {max(limit, 0):.0f} s)", flush=True)
        outcome = run(part, device, quick, limit)
        print(f"{part.name}: {outcome.status} after {outcome.seconds:.0f} s\n{outcome.output}", flush=True)
        result["parts"][part.name] = outcome.as_json()
        gpu_ceilings.add_percentages(result["parts"])
        result["goals"] = gpu_goals.judge(result["parts"])
        write_json(path, result)
    return result


def run(part: Part, device: str, quick: bool, limit: float) -> Outcome:
    """One part in a process group of its own, which is killed whole when `limit` seconds have passed."""
    if limit < LEAST_S:
        return Outcome("no time left", 0, limit, {})
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        figures, log = Path(folder) / "figures.json", Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.gpu_parts", part.module, "--output", str(figures)]
        command += ["--device", device, *(["--quick"] if quick else [])]
        with open(log, "w") as said:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
            try:
                status = STATUS.get(process.wait(limit), "failed")
            except subprocess.TimeoutExpired:
                status = "out of time"
            finally:
                # Also of a part that ended: what it started and left must not disturb the next.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        spent = time.monotonic() - started
        measured = json.loads(figures.read_text()) if figures.is_file() else {}
        output = "" if status == "done" else without_paths(log.read_text(errors="replace"))[-OUTPUT_KEPT:]
    return Outcome(status, spent, limit, measured, output)


def without_paths(text: str) -> str:
    """Files of this folder and of installed packages by relative names: where they lie is the machine's affair."""
    text = text.replace(f"{ROOT}/", "")
    return re.sub(r"(?<![\w.])/[\w./+-]*/(?:site|dist)-packages/", "", text)


def environment() -> dict[str, str]:
    """No part may reach for a network; this folder's packages come first."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def describe(device: str) -> dict[str, Any]:
    """Machine, versions and device.

    Raises:
        SystemExit: there is no CUDA device.
    """
    import torch

    about: dict[str, Any] = {"benchmark": "gpu_check", **record.conditions(), "device": "CPU (a dry run)"}
    if device == "cpu":
        return about
    if not torch.cuda.is_available():
        sys.exit("no CUDA device that torch can use: nothing to check here (--dry-run runs on the CPU)")
    properties = torch.cuda.get_device_properties(0)
    return about | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory GB": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "CUDA of torch": torch.version.cuda,
        "driver": driver_version(),
    }


def driver_version() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def record_path(about: dict[str, Any]) -> Path:
    """benchmarks/results/gpu/<device>-<date>.json"""
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return record.RESULTS / "gpu" / f"{name}-{datetime.now(UTC):%Y-%m-%d}.json"


def tables(result: dict[str, Any]) -> list[Table]:
    """The parts, every figure, and the figures against their goals; the last is the one to read first."""
    parts = Table(title=f"{result['device']}, {result['versions']}, {result['commit']}")
    for column in ("part", "status", "s", "of at most"):
        parts.add_column(column, justify="right" if column in ("s", "of at most") else "left")
    figures = Table(title="figures")
    for column in ("part", "variant", "figures"):
        figures.add_column(column)
    for name, part in result["parts"].items():
        parts.add_row(name, part["status"], f"{part['seconds']:.0f}", f"{part['limit s']:.0f}")
        for variant, values in part["figures"].items():
            figures.add_row(
                name, variant, ", ".join(f"{figure} {value:.4g}" for figure, value in values.items())
            )
    return [figures, parts, gpu_goals.table(result["goals"])]


if __name__ == "__main__":
    main()
