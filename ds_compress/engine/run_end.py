"""What a run says when it ends; one that ends before its schedules do says so where it is saved, too.

Where the length of a run is known at start, a schedule that ends later is an error then.

Known lengths: `total_num_steps` of DeepSpeed's schedulers, `total_steps` of torch's OneCycleLR, and a Trainer's
`max_steps` (see `hf.callback`).
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from ds_compress.config.schema.run_length import refuse_unfinished, unfinished_line
from ds_compress.engine.announce import announce_end
from ds_compress.engine.outcome import Place
from ds_compress.engine.registry import run_of

if TYPE_CHECKING:
    from ds_compress.engine.run import CompressionRun

logger = logging.getLogger("ds_compress")

_SAVES = "save_16bit_model"
_LAST_CALLS = (_SAVES, "destroy")
_LENGTHS = ("total_num_steps", "total_steps")
_running: weakref.WeakSet[CompressionRun] = weakref.WeakSet()


def watch(engine: Any, run: CompressionRun) -> None:
    """Checks the schedules against the engine's scheduler now, and at each call that may be the run's last.

    Raises:
        ConfigError: a schedule ends after the last step that the learning-rate scheduler counts to.
    """
    for name in _LENGTHS:
        steps = getattr(engine.lr_scheduler, name, None)
        if isinstance(steps, int) and steps > 0:
            source = f"{name} of {type(engine.lr_scheduler).__name__}"
            refuse_unfinished(run.config, steps, source)
    for name in _LAST_CALLS:
        _prepend(engine, name, run)
    _running.add(run)


def warn_if_unfinished(run: CompressionRun) -> None:
    """The line about schedules that have not ended, once for each state of the counters."""
    steps = run.applied_steps
    line = unfinished_line(run.config, steps)
    if line is not None and steps and run.warned_unfinished_at != steps:
        run.warned_unfinished_at = steps
        logger.warning("%s", line)


def say_end(run: CompressionRun, source: str = "engine") -> None:
    """What was reached, loud where it is less than the config says; `source`: see `announce_end`."""
    warn_if_unfinished(run)
    announce_end(run, source)


def remember_export(source: Any, folder: str) -> None:
    """`folder` is an export of `source`: of an engine, a Trainer or a model that is in training, see `export`."""
    engine = getattr(source, "deepspeed", None) or source
    run = getattr(engine, "compression", None)
    if run is None and isinstance(source, nn.Module):
        run = run_of(source)
    if run is not None:
        run.outcome.place = Place(folder, run.applied_steps, is_export=True)


def warn_if_alone(processes: int | None = None) -> None:
    """A launcher started several processes, and this one believes that it trains by itself.

    `processes`: how many there are for the one who asks (a Trainer splits its data among them); by default, those of
    the process group.
    """
    launched = os.environ.get("WORLD_SIZE", "")
    if processes is None:
        processes = dist.get_world_size() if dist.is_initialized() else 1
    if launched.isdigit() and int(launched) > 1 and processes == 1:
        logger.warning(
            "the launcher started %s processes, but each believes that it is the only one: all read the same data, "
            "log, and write to the same places. For Hugging Face's Trainer on a CPU, set use_cpu=True in "
            "TrainingArguments (--use_cpu on the command line)",
            launched,
            extra={"every_process": True},
        )


def _prepend(engine: Any, name: str, run: CompressionRun) -> None:
    def prepended(*args: Any, **kwargs: Any) -> Any:
        if name == _SAVES:
            warn_if_unfinished(run)
        elif run.is_running:
            say_end(run)
        if name == _SAVES and run.is_running:
            # DeepSpeed has every process call it, and writes what forward reads.
            run.refresh_weights()
        return call(*args, **kwargs)

    call = run.patches.install(engine, name, prepended)


@atexit.register
def _at_exit() -> None:
    # What was reached when an exception ended the training is no result to go on with.
    crashed = getattr(sys, "last_value", None) is not None
    for run in list(_running):
        if not run.is_running:
            continue
        if crashed:
            warn_if_unfinished(run)
        else:
            say_end(run)
