"""The tests that need a device, as a part of `gpu_check`: counted one by one, so a cut-off run says how far it got.

python -m benchmarks.gpu_parts tests --output FILE
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from .gpu_parts import Report
from .record import Figures

ROOT = Path(__file__).resolve().parents[1]
MOST_AT_A_TIME = 12  # processes; each holds a CUDA context of half a gigabyte


class Count:
    """A pytest plugin that counts outcomes and reports after every test."""

    def __init__(self, report: Report) -> None:
        self.outcomes: Counter[str] = Counter()
        self.report = report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if (
            report.when == "call" or report.outcome != "passed"
        ):  # a skip or an error of set-up is an outcome, too
            self.outcomes[report.outcome] += 1
            self.report(self.figures())

    def figures(self) -> Figures:
        return {
            "pytest -m gpu": {outcome: self.outcomes[outcome] for outcome in ("passed", "failed", "skipped")}
        }


def measure(device: torch.device, quick: bool, report: Report) -> Figures:
    """How many passed, failed and were skipped; what failed is in the output.

    Raises:
        RuntimeError: a test failed, or on a device none ran.
    """
    count = Count(report)
    arguments = ["-m", "gpu", "-q", "-rfE", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    if device.type == "cuda" and importlib.util.find_spec("xdist"):
        processes = max(1, min(MOST_AT_A_TIME, len(os.sched_getaffinity(0)) - 2))
        arguments += ["-n", str(processes), "--dist", "worksteal"]
    # Without a device every one of these is skipped, and one file shows that as well as all.
    files = [str(ROOT / "tests" / "native" / "test_cuda_device.py")] if quick else [str(ROOT / "tests")]
    status = pytest.main([*arguments, *files], plugins=[count])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {status}")
    if device.type == "cuda" and not count.outcomes["passed"]:
        raise RuntimeError("no test ran on the device")
    return count.figures()
