"""What compression has to say, in DeepSpeed's own monitor: TensorBoard, W&B, CSV, Comet.

Tags are `Compress/<technique>/<name>`, e.g. `Compress/sparse_pruning/sparsity`; the x axis is samples, as
for DeepSpeed's own events. Numbers may cost a wait for the device, so they are asked for on process 0 only, every
`steps_per_print` applied steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PREFIX = "Compress"
_INTERVAL = 10
"""DeepSpeed's default of `steps_per_print`; accelerate and the Trainer set that to infinity to quiet the console."""


def is_due(engine: Any) -> bool:
    """Whether this process writes after the step that was just applied."""
    monitor = getattr(engine, "monitor", None)
    if monitor is None or not monitor.enabled or engine.global_rank != 0:
        return False
    return bool(engine.global_steps % interval(engine.steps_per_print()) == 0)


def interval(steps_per_print: float | None) -> int:
    """Applied steps between two writes."""
    if steps_per_print is None or not math.isfinite(steps_per_print):
        return _INTERVAL
    return max(1, int(steps_per_print))


def write(engine: Any, metrics: Mapping[str, float]) -> None:
    """Writes {"<technique>/<name>": value}."""
    if metrics:
        samples = engine.global_samples
        engine.monitor.write_events([(f"{PREFIX}/{name}", value, samples) for name, value in metrics.items()])
