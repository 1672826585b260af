"""Training off the CPU, on a device that is simulated: where tensors of two devices meet, and what the host waits for.

Every check trains, or computes, on the CPU and on the device, and gets the same numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module", params=["native", "reference"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """{check: what went wrong, or None}, on the kernels and on plain torch."""
    path = tmp_path_factory.mktemp("devices") / "found.json"
    environment = os.environ | {
        "DS_COMPRESS_KERNELS": request.param,
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.device_runs", str(path)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    results: dict[str, str | None] = json.loads(path.read_text())
    return results


def test_all_checks_pass(found: dict[str, str | None]) -> None:
    assert len(found) > 25
    wrong = {name: text for name, text in found.items() if text is not None}
    assert not wrong, "\n\n".join(f"{name}:\n{text}" for name, text in wrong.items())
