"""What compression has to say while it trains: in DeepSpeed's own monitor (TensorBoard, W&B, CSV, Comet) and log.

Tags are `Compress/<technique>/<name>`, e.g. `Compress/sparse_pruning/sparsity`; the x axis is samples, as
for DeepSpeed's own events. Numbers may cost a wait for the device, so they are asked for on process 0 only, every
`steps_per_print` applied steps. A config with that key gets them as a line of the log, too, beside DeepSpeed's own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("ds_compress")

PREFIX = "Compress"
_MOST_IN_LINE = 12
"""Of all numbers: robust_reduction has three of each worker."""
_INTERVAL = 10
"""DeepSpeed's default of `steps_per_print`; accelerate and the Trainer set that to infinity to quiet the console."""


def tell(engine: Any, step: int) -> None:
    """After the applied step `step`: writes to the monitor, and the line of the log, where they are due."""
    writes, logs = is_due(engine), is_printed(engine)
    if not writes and not logs:
        return
    metrics = engine.compression.metrics()
    if writes:
        write(engine, metrics)
    if logs and metrics:
        logger.info("step %s: %s", f"{step:,}", in_short(metrics))


def is_printed(engine: Any) -> bool:
    """Whether DeepSpeed prints its own line after the step that was just applied, and ours is wanted."""
    every = engine.steps_per_print()
    if every is None or not math.isfinite(every) or engine.global_rank != 0:
        return False
    return bool(engine.global_steps % interval(every) == 0 and logger.isEnabledFor(logging.INFO))


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


def in_short(numbers: Mapping[str, float]) -> str:
    """{"<technique>/<name>": value} in one line of the log."""
    shown = [f"{name} {value:.4g}" for name, value in [*numbers.items()][:_MOST_IN_LINE]]
    more = len(numbers) - len(shown)
    return ", ".join(shown) + (f" and {more} more in engine.compression.metrics()" if more else "")
