"""`ds_compress plan --search`: a format for each group of layers, written as a config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_compress.sensitivity.goal import Goal
    from ds_compress.sensitivity.search import Searched
    from ds_compress.sensitivity.table import Sensitivity


@dataclass(frozen=True)
class Request:
    """What is searched, and the file that is written."""

    table: Sensitivity
    goal: Goal
    out: Path


@dataclass(frozen=True)
class Answer:
    """content: of the new file. is_whole: a DeepSpeed JSON, and not a block by itself."""

    content: dict[str, Any]
    searched: Searched
    is_whole: bool


def request(
    wanted: bool,
    table: Path | None,
    size: str | None,
    effective_bits: float | None,
    latency: str | None,
    device: str | None,
    tokens: int | None,
    out: Path | None,
    overwrite: bool,
) -> Request | None:
    """None without --search. device, tokens: of the goal --latency.

    Raises:
        ValueError: options that are missing, too many or without --search; a table or a size that is none; a file that
            exists or cannot be written.
    """
    from ds_compress.estimate import devices
    from ds_compress.sensitivity.goal import EffectiveBits, Latency, StoredBytes, bytes_of, seconds_of
    from ds_compress.sensitivity.table import Sensitivity

    given = {
        "--sensitivity": table,
        "--size": size,
        "--effective-bits": effective_bits,
        "--latency": latency,
        "--output": out,
        "--overwrite": overwrite or None,
    }
    if not wanted:
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"{option} says something of a search: say --search, too")
        return None
    if table is None:
        raise ValueError("--search needs --sensitivity FILE, which `ds_compress sensitivity` writes")
    if sum(goal is not None for goal in (size, effective_bits, latency)) != 1:
        raise ValueError("--search needs one goal: --size 20MB, --effective-bits 4.5, or --latency 10ms")
    if latency is not None and (device is None or tokens is None):
        raise ValueError("--latency is that of a forward of --tokens on --device: say both")
    if out is None:
        raise ValueError("--search needs --output FILE for the config that it writes")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: give another file by --output, or say --overwrite")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"{out.parent} is no folder that can be written to")
    if not table.is_file():
        raise ValueError(f"{table}: there is no such file")
    goal: Goal
    if latency is not None and device is not None and tokens is not None:
        goal = Latency(seconds_of(latency), devices.device(device), tokens)
    else:
        goal = StoredBytes(bytes_of(size)) if size is not None else EffectiveBits(effective_bits or 0.0)
    return Request(Sensitivity.read(table), goal, out)


def answer(asked: Request, model: Path, config: Path) -> Answer:
    """Raises ValueError or ConfigError for what `search` refuses, and for what the start of a training would."""
    from ds_compress.cli.models import skeleton
    from ds_compress.config.schema.source import read_json
    from ds_compress.engine.preflight import preflight
    from ds_compress.errors import ROOT, ConfigError
    from ds_compress.sensitivity.search import search

    content = read_json(str(config))
    if not isinstance(content, dict):
        raise ValueError(f"{config} is no JSON object")
    is_whole = ROOT in content or not _is_block(content)
    found = search(
        skeleton(model), (content.get(ROOT) or {}) if is_whole else content, asked.table, asked.goal
    )
    made = {**content, ROOT: found.block} if is_whole else found.block
    checked = preflight(made, skeleton(model))
    if checked.problems:
        raise ConfigError(checked.problems)
    return Answer(made, found, is_whole)


def report(asked: Request, found: Answer) -> dict[str, Any]:
    """What `cli.results` describes under `search`."""
    return {
        "output": str(asked.out),
        "goal": str(asked.goal).removeprefix("--"),
        "metric": asked.table.metric.value,
        **found.searched.as_data(),
    }


def write(asked: Request, found: Answer) -> list[str]:
    """Writes the file; returns what to tell."""
    from ds_compress.config.recipes.deepspeed import json_text
    from ds_compress.files import atomic_write

    atomic_write(asked.out, json_text(found.content))
    searched, metric = found.searched, asked.table.metric.value
    lines = [
        f"search for {asked.goal}: predicted {_in_words(searched.predicted, metric)}",
        *(
            f"every group in {name}: predicted {_in_words(uniform, metric)}"
            for name, uniform in searched.uniform.items()
        ),
    ]
    kind = "" if found.is_whole else ", a block to put into a DeepSpeed JSON"
    return [*lines, f"written: {asked.out}{kind}"]


def _in_words(predicted: Any, metric: str) -> str:
    size = f"{predicted.effective_bits:.3f} bits, at most {predicted.bytes / 1e6:.2f} MB"
    time = "" if predicted.seconds is None else f", {predicted.seconds * 1e3:.4g} ms at least"
    return f"{size}{time}, {metric} +{predicted.increase:.3g}"


def _is_block(content: Mapping[str, Any]) -> bool:
    """Whether these are keys of a `compression_training` block by itself."""
    from ds_compress.config.schema.compression_training import SCHEMA_KEY, config_model

    keys = [key for key in content if key != SCHEMA_KEY]
    return bool(keys) and all(key in config_model().model_fields for key in keys)
