"""What `ds_compress report` needs to know of a run, and no weight says: as JSON values, in checkpoints and exports.

    <tag>/ds_compress/run.json          beside the compression state of a checkpoint
    <export>/ds_compress_run.json       see `export.run_record`

Process 0 writes it. A resumed run goes on with its history. A checkpoint of an older version has none: no error.
"""

from __future__ import annotations

import json
import logging
import math
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ds_compress.export import run_record
from ds_compress.export.versions import versions
from ds_compress.files import atomic_write
from ds_compress.ops import library

if TYPE_CHECKING:
    from ds_compress.config.report.resolved import ResolvedPlan
    from ds_compress.engine.run import CompressionRun

logger = logging.getLogger("ds_compress")

FILE_NAME = "run.json"


def of(run: CompressionRun) -> dict[str, Any]:
    """The record; in processes other than 0 its history is empty. Waits for the device."""
    with run.kernels:
        kernels = library.in_use()
    engine = run.engine
    return {
        "format": run_record.FORMAT,
        "class": type(run.model).__name__,
        "recipe": run.given.recipe,
        "compression_training": run.block,
        "applied_steps": run.applied_steps,
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "zero_stage": None if engine is None else engine.zero_optimization_stage(),
        "kernels": None if kernels is None else kernels.value,
        "versions": {**versions(), "deepspeed": metadata.version("deepspeed")},
        "treatments": treatments(run.plan),
        "details": {name: details for name, t in run.techniques.items() if (details := t.report_details())},
        "history": run.recorded_history(),
    }


def treatments(plan: ResolvedPlan) -> dict[str, dict[str, Any]]:
    """{parameter: {"parameters": numbers in it, "treatment": what blocks make of it, in words}} of what is claimed."""
    found: dict[str, dict[str, Any]] = {}
    for key, technique in plan.techniques.items():
        block = plan.weight_block(key)
        for target in technique.targets:
            new = {"parameters": math.prod(target.shape), "treatment": ""}
            entry = found.setdefault(target.param_name, new)
            said = f"{block.column}: {block.describe_target(target)}"
            entry["treatment"] = "; ".join(filter(None, (entry["treatment"], said)))
    return found


def write(folder: Path, run: CompressionRun) -> None:
    """Writes `run.json`; appears only when complete."""
    atomic_write(folder / FILE_NAME, json.dumps(of(run), allow_nan=False) + "\n")


def restore(folder: Path, run: CompressionRun) -> None:
    """The history of `run` goes on after the one in `folder`; anew where there is none that can be read."""
    run.history.clear()
    try:
        if (record := run_record.read(folder / FILE_NAME)) is not None:
            run.history.load(record["history"])
    except (KeyError, TypeError, ValueError) as error:
        # A picture of the past is not worth a run that does not start.
        run.history.clear()
        logger.warning("ds_compress: the history of the run begins anew: %s", error)
