"""What a run says when it starts, and when it ends: lines of a small table each, one record of the log per line."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ds_compress import log
from ds_compress.config.report.coverage import left_out
from ds_compress.config.report.table import describe
from ds_compress.config.schema.run_length import unfinished
from ds_compress.engine.outcome import Expected, Place
from ds_compress.modelinfo.inventory import few

if TYPE_CHECKING:
    from ds_compress.engine.run import CompressionRun

logger = logging.getLogger("ds_compress")

_NUMBER = "<10.4g"
"""As wide as any: rows are as wide in each run, whatever the numbers."""
_CLOSE = 0.01
"""Of a planned number: units and masks are whole, so that a share is met up to rounding."""
_MOST_NUMBERS = 12
"""Rows for the unplanned ones: robust_reduction has three of each worker."""


def announce_start(run: CompressionRun, engine: Any) -> None:
    """A table with a row for each enabled block: its steps, what it will reach, and how; predicted bytes above it.

    Below it what a default left out, and the hashes of secret seeds.
    """
    plan = run.plan
    if not run.techniques and not plan.config.layer_reduction:
        return  # the line that nothing is enabled is there already
    if _says_nothing():
        expected = Expected()
    else:
        run.outcome.expected = expected = Expected.of(plan)
    count = sum(weight.numel for weight in plan.weights)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    where = (
        f"ZeRO stage {engine.zero_optimization_stage()}, {processes} process{'es' if processes > 1 else ''}"
    )
    size = f": {expected.size}" if expected.size else ""
    logger.info("%s with %s parameters, %s%s", type(run.model).__name__, f"{count:,}", where, size)
    blocks = plan.config.enabled_blocks()
    rows = []
    for key, what in describe(plan):
        if key not in blocks:  # the recipe
            logger.info("%s: %s", key, what)
            continue
        when = blocks[key].when
        rows.append((key, when, _numbers_of(key, expected), _without(when, what)))
    for line in _columns(rows):
        logger.info("%s", line)
    for seed, commitment in run.commitments.items():
        logger.info("%s is secret, commitment %s", seed, commitment)
    for key, technique in run.techniques.items():
        if whole := technique.untouched():
            logger.warning(
                "%s removes nothing from %s: its dense_ratio is rounded up to all of the few units there",
                key,
                few(whole),
            )
    for missing in left_out(plan):
        logger.log(logging.INFO if missing.is_expected else logging.WARNING, "%s", missing)


def announce_end(run: CompressionRun, source: str = "engine") -> None:
    """What was reached against the plan, where it lies, and the next command; once for each state of the counters.

    source: what the reader's code calls that which can be exported. No collectives: any process may ask alone.
    """
    outcome, steps = run.outcome, run.applied_steps
    if _says_nothing():
        return
    if steps and steps != outcome.told_at:
        for line in _reached(run):
            logger.info("%s", line)
    elif outcome.place in (None, outcome.told_place):
        return
    outcome.told_at, outcome.told_place = steps, outcome.place
    logger.info("%s", _next(outcome.place, steps, run.model, source))


def _says_nothing() -> bool:
    """Whether lines of the level INFO go nowhere from here: then nothing is computed for them."""
    return log.rank() != 0 or not logger.isEnabledFor(logging.INFO)


def _numbers_of(key: str, expected: Expected) -> str:
    block = f"{key}/"
    found = {name: value for name, value in expected.numbers.items() if name.startswith(block)}
    return ", ".join(f"{name.removeprefix(block)} {value:.4g}" for name, value in found.items())


def _without(when: str, what: str) -> str:
    """`what` without the steps, which have a column."""
    return ", ".join(part for part in what.split(", ") if part != when)


def _columns(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Rows with their cells below each other; a column that is empty in all of them is left out."""
    cells = [column for column in zip(*rows, strict=True) if any(column)]
    widths = [max(map(len, column)) for column in cells]
    for row in zip(*cells, strict=True):
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _reached(run: CompressionRun) -> Iterator[str]:
    """The head line, and a row for each number."""
    expected, numbers = run.outcome.expected, run.metrics()
    missed = [name for name, value in expected.numbers.items() if not _is_close(numbers.get(name), value)]
    verdict = ""
    if unfinished(run.config, run.applied_steps):
        verdict = ", before all schedules have ended"
    elif missed:
        verdict = ", not all as planned"
    elif expected.numbers:
        verdict = ", all as planned"
    size = f": {expected.size}" if expected.size else ""
    yield f"after {run.applied_steps:,} steps{verdict}{size}"
    rows = []
    for name, value in expected.numbers.items():
        got = f"{numbers[name]:{_NUMBER}}" if name in numbers else "-"
        rows.append((name, got, f"planned {value:.4g}"))
    others = {name: value for name, value in numbers.items() if name not in expected.numbers}
    rows += [(name, f"{value:{_NUMBER}}", "") for name, value in [*others.items()][:_MOST_NUMBERS]]
    yield from _columns(rows)
    if len(others) > _MOST_NUMBERS:
        yield f"  and {len(others) - _MOST_NUMBERS} more in engine.compression.metrics()"


def _is_close(got: float | None, planned: float) -> bool:
    return got is not None and math.isclose(got, planned, rel_tol=_CLOSE, abs_tol=_CLOSE)


def _next(place: Place | None, steps: int, model: Any, source: str) -> str:
    """Where the result lies and what to do with it."""
    call = f'ds_compress.export({source}, "compressed")'
    if place is None:
        return f"no checkpoint was saved and nothing exported; next: {call}"
    folder = shlex.quote(place.folder)
    if place.is_export:
        lies = f"exported to {place.folder}"
        then = f"ds_compress inspect {folder}"
    else:
        lies = f"saved in {place.folder}"
        then = f"ds_compress export {folder} compressed"
        if not hasattr(model, "save_pretrained"):
            then = f'ds_compress.export("{place.folder}", "compressed", model=...), with an instance of the model'
    if place.steps < steps:
        return f"{lies} after {place.steps:,} steps, the later ones are not; next: {call}"
    return f"{lies}; next: {then}"
