"""One peer from outside: its process, what it can run, and how long a run takes."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from . import environments

_ROOT = Path(__file__).resolve().parents[2]
_SAME_FOR_ALL = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(_ROOT),
    "PYTHONWARNINGS": "ignore",
    # What `keep_freed_memory` does in ours: else glibc unmaps and faults in anew what each step or batch allocates.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}


class PeerError(RuntimeError):
    """A peer ended; says what it printed last."""


class Peer:
    """A context: the process lives as long as it. Attributes: `runs`, `facts` {run: {figure: value}}, `versions`."""

    def __init__(self, module: str, environment: str, arguments: Sequence[str]) -> None:
        self._name = module
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(environments.python_of(environment)), "-m", "benchmarks.peers.start", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            cwd=_ROOT,
            env={**os.environ, **_SAME_FOR_ALL},
        )

    def ready(self) -> None:
        """Waits until it is prepared.

        Raises:
            PeerError: it ended before.
        """
        told = self._answer()
        self.runs: list[str] = told["runs"]
        self.facts: dict[str, dict[str, float]] = told["facts"]
        self.versions: dict[str, str] = told["versions"]

    def run(self, name: str) -> tuple[float, float]:
        """(CPU seconds of its process, wall seconds) of one run.

        Raises:
            PeerError: it ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(name) + "\n")
        cpu, wall = self._answer()
        return cpu, wall

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        last = " | ".join(self._log.read().strip().splitlines()[-3:])
        raise PeerError(f"{self._name} ended with code {self._process.returncode}: {last}")

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
