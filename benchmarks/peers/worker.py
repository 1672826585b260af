"""The process of a peer: says what it can run, then runs what it is told and says how long that took.

Needs nothing but Python, so that it works in every environment. A line of JSON goes each way per run; whatever a
package prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any


def serve(
    runs: Mapping[str, Callable[[], object]],
    packages: Sequence[str],
    facts: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Runs until stdin ends. packages: whose versions are told; facts: figures that are known of a run beforehand."""
    answers = os.fdopen(_ANSWERS, "w", buffering=1)
    versions = {package: version(package) for package in packages}
    answers.write(json.dumps({"runs": list(runs), "facts": facts or {}, "versions": versions}) + "\n")
    for line in sys.stdin:
        run = runs[json.loads(line)]
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        taken = time.process_time() - cpu, time.perf_counter() - wall
        answers.write(json.dumps(taken) + "\n")


def bytes_of(folder: Any, *patterns: str) -> float:
    """Of the files of a model that hold its weights."""
    return float(sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern)))


_ANSWERS = os.dup(1)
os.dup2(2, 1)
