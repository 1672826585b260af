"""What the files of one run say of it, as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_compress.config.schema.compression_training import parse_config
from ds_compress.config.schema.run_length import schedule_ends
from ds_compress.engine import record
from ds_compress.engine.checkpoint import model_file, state
from ds_compress.engine.checkpoint.tags import FOLDER
from ds_compress.engine.history import History
from ds_compress.errors import CheckpointError, ConfigError
from ds_compress.export import run_record
from ds_compress.export.report import ExportReport, stored_as
from ds_compress.export.whole import refuse_damaged
from ds_compress.manifest import FILE_NAME as MANIFEST
from ds_compress.report import sources
from ds_compress.report.modules import by_layer, of_checkpoint


def summary(run: Path) -> dict[str, Any]:
    """The keys that `cli.results` describes for a run of `ds_compress report`; null or empty where nobody knows.

    Raises:
        CheckpointError, ExportError: a file is missing or damaged.
        ValueError: the folder is neither, or a record is damaged.
    """
    found = sources.find(run)
    made: dict[str, Any] = {
        "run": str(run),
        "checkpoint": None if found.checkpoint is None else str(found.checkpoint),
        "export": None if found.export is None else str(found.export),
        **dict.fromkeys(("model_class", "recipe", "config", "steps", "processes", "zero_stage", "kernels")),
        **{
            "blocks": [],
            "schedules": [],
            "history": None,
            "token_shares": {},
            "flagged_workers": {},
            "judged_steps": None,
        },
        **dict.fromkeys(("format", "bytes", "dense_bytes", "ratio", "parameters", "sparsity")),
        **{"layers": [], "kept_units": {}, "metrics": {}, "commitments": {}, "check": {}},
        **{"notes": [], "versions": {}},
    }
    if found.export is not None:
        _add_export(made, found.export)
    if found.checkpoint is not None:
        _add_checkpoint(made, found.checkpoint)
    if found.passed_over:
        made["notes"].append(
            f"of {len(found.passed_over) + 1} checkpoints in {run} this is the one that was saved last"
        )
    if made["history"] is None:
        made["notes"].append(
            "there is no history over steps: this was saved by an older version, or without a run"
        )
    _add_schedules(made)
    return made


def _add_export(made: dict[str, Any], folder: Path) -> None:
    names = [folder / "ds_compress.json", folder / run_record.FILE_NAME]
    refuse_damaged(folder, names)
    report = ExportReport.read(folder)
    keys = ("model_class", "steps", "format", "bytes", "dense_bytes", "parameters", "metrics", "commitments")
    made |= {key: getattr(report, key) for key in (*keys, "check", "versions")}
    made |= {"ratio": round(report.ratio, 3), "sparsity": round(report.sparsity, 4)}
    made["notes"] += report.notes
    modules = (
        {
            "name": name,
            "parameters": module.get("parameters", 0),
            "nonzeros": module.get("nonzeros", 0),
            "bytes": module.get("bytes", 0),
            "stored_as": stored_as(module),
        }
        for name, module in report.modules.items()
    )
    made["layers"] = by_layer(modules)
    _add_record(made, run_record.read(folder / run_record.FILE_NAME))


def _add_checkpoint(made: dict[str, Any], folder: Path) -> None:
    files = [f"{FOLDER}/{name}" for name in (model_file.FILE_NAME, record.FILE_NAME, state.STATE)]
    if (folder / MANIFEST).exists():
        sources.refuse_damaged(folder, files)
    saved, told = state.read(folder / FOLDER), model_file.read(folder / FOLDER)
    if saved is None or told is None:
        raise CheckpointError(f"{folder} has no {FOLDER}/{model_file.FILE_NAME}: it is incomplete")
    if made["steps"] is not None and made["steps"] != saved["applied_steps"]:
        made["notes"].append(
            f"the export is of step {made['steps']}, the checkpoint of step {saved['applied_steps']}: sizes are of the "
            "first, history and schedules of the second"
        )
    made |= {
        "model_class": told["class"],
        "recipe": told.get("recipe"),
        "config": told["compression_training"],
    }
    made |= {"steps": saved["applied_steps"], "processes": saved["world_size"]}
    of_run = run_record.read(folder / FOLDER / record.FILE_NAME)
    _add_record(made, of_run)
    for stage in saved["stages"].values():
        kept = stage.get("kept") if isinstance(stage, Mapping) else None
        if isinstance(kept, Mapping):
            made["kept_units"] |= {name: len(units) for name, units in kept.items()}
    if not made["layers"]:
        fragments = state.files_of(folder / FOLDER, saved)
        # Records of older versions have none.
        treatments = (of_run or {}).get("treatments", {})
        try:
            made["layers"] = by_layer(of_checkpoint(fragments, treatments))
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(error) from error


def _add_record(made: dict[str, Any], found: dict[str, Any] | None) -> None:
    if found is None:
        return
    try:
        # Raises where the page could not draw it.
        History().load(found["history"])
        made |= {"recipe": found["recipe"], "kernels": found["kernels"], "history": found["history"]}
        made |= {"processes": found["processes"], "zero_stage": found["zero_stage"]}
        made["config"] = made["config"] or found["compression_training"]
        made["steps"] = found["applied_steps"] if made["steps"] is None else made["steps"]
        made["versions"] = {**found["versions"], **made["versions"]}
        for details in found["details"].values():
            for name, shares in details.get("token_shares", {}).items():
                made["token_shares"][name] = [float(share) for share in shares]
            if "judged_steps" in details:
                counts = {worker: int(steps) for worker, steps in details["flagged_workers"].items()}
                made |= {"flagged_workers": counts, "judged_steps": int(details["judged_steps"])}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> ValueError:
    return ValueError(f"the record of the run is damaged: {type(error).__name__} {error}")


def _add_schedules(made: dict[str, Any]) -> None:
    """The enabled blocks; and by schedule the key that ends it, the step, and whether the run got there."""
    if made["config"] is None:
        return
    try:
        config = parse_config(made["config"])
        made["blocks"], ends = list(config.enabled_blocks()), list(schedule_ends(config))
    except ConfigError as error:
        made["notes"].append(
            f"this version of ds_compress cannot read the block: {' '.join(str(error).split())}"
        )
        return
    steps = made["steps"]
    made["schedules"] = [
        {"block": end.block, "path": end.path, "step": end.step}
        | {"is_reached": None if steps is None else steps >= end.step}
        for end in ends
    ]
