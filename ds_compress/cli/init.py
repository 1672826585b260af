"""`ds_compress init`: a whole DeepSpeed JSON from a recipe, asked for step by step or by flags."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_compress.cli.output import AsJson, output
from ds_compress.cli.questions import KINDS, Answers, ask, kind_of

if TYPE_CHECKING:
    from ds_compress.config.recipes import Recipe


class Hardware(StrEnum):
    """What trains."""

    GPU = "gpu"
    CPU = "cpu"


def init(
    recipe: Annotated[
        str | None, typer.Option(help="name, or name@version; --list says what each is for")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=f"folder of a transformers model, to try the recipe on; or {', '.join(KINDS)}"),
    ] = None,
    hardware: Annotated[Hardware | None, typer.Option(help="what trains; by default cpu")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="of the run: GPUs, or processes on CPUs")
    ] = None,
    zero_stage: Annotated[int | None, typer.Option(min=1, max=3, help="by default 2")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="examples of each process at a time; by default 4")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="optimizer steps of the run, which schedules follow; by default 1000"),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE of the block, e.g. sparse_pruning.shared_parameters.dense_ratio=0.2"
        ),
    ] = None,
    trainer: Annotated[
        bool, typer.Option("--trainer", help='leave to TrainingArguments what they decide ("auto")')
    ] = False,
    out: Annotated[Path, typer.Option(help="file to write")] = Path("ds_config.json"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
    lists: Annotated[
        bool, typer.Option("--list", help="print the recipes, a line each, and write nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Writes a DeepSpeed JSON from a recipe; without --recipe it asks for everything, at a terminal."""
    with output(as_json) as printed:
        from ds_compress.config.recipes import find, newest
        from ds_compress.errors import ConfigError

        if lists:
            for each in newest().values():
                printed.say(f"{each.name:12} {each.use}")
            printed.done(out=None, recipes={each.label: each.use for each in newest().values()}, notes=[])
            return
        if out.exists() and not overwrite:
            raise ValueError(f"{out} exists: give another file by --out, or say --overwrite")
        known = Answers(recipe, model, hardware, processes, zero_stage, batch_size, steps)
        if recipe is None:
            if as_json or not _is_at_a_terminal():
                raise ValueError("which recipe? say --recipe NAME; ds_compress init --list has the names")
            known = ask(known, list(newest().values()))
        known = known.with_defaults()
        try:
            lines = _write(known, _overrides(override or ()), trainer, out)
        except ConfigError as error:
            raise ValueError("; ".join(map(_one_line, error.problems))) from None
        for line in lines:
            printed.say(line)
        taken = find(known.recipe)
        printed.done(out=str(out), recipes={taken.label: taken.use}, notes=lines)


def _is_at_a_terminal() -> bool:
    return sys.stdin.isatty()


def _write(answers: Answers, overrides: Mapping[str, Any], trainer: bool, out: Path) -> list[str]:
    """Writes the file once the config is checked, and on a folder's model, too; returns what to tell.

    Raises:
        ConfigError, ValueError: the recipe is unknown, not for this model or run, or an override is wrong.
    """
    from ds_compress.config.recipes import find
    from ds_compress.config.recipes.deepspeed import json_text, whole_config
    from ds_compress.config.schema.compression_training import parse_config
    from ds_compress.config.schema.run_length import refuse_unfinished
    from ds_compress.errors import ROOT
    from ds_compress.files import atomic_write

    recipe, steps = find(answers.recipe), answers.steps or 0
    _refuse_misfit(recipe, answers)
    config = whole_config(
        recipe,
        answers.zero_stage or 0,
        overrides=overrides,
        batch_size=answers.batch_size or 0,
        steps=steps,
        on_gpu=answers.hardware == Hardware.GPU,
        for_trainer=trainer,
    )
    refuse_unfinished(parse_config(config[ROOT]), steps, "--steps")
    lines = [f"{out}: {recipe.label}: {recipe.does}", f"loads in: {recipe.loads_in}"]
    if recipe.needs:
        lines.append(f"needs: {recipe.needs}")
    if answers.model is not None and answers.model not in KINDS and not _is_about_adapters(config):
        _try_on(answers.model, config)
        lines.append(f"look at it: ds_compress plan {answers.model} {out}")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder")
    atomic_write(out, json_text(config))
    if trainer:
        return [*lines, f'train: import ds_compress, and TrainingArguments(deepspeed="{out}")']
    return [*lines, f"train: deepspeed --module ds_compress.run YOUR_SCRIPT.py --deepspeed_config {out}"]


def _refuse_misfit(recipe: Recipe, answers: Answers) -> None:
    kind = None if answers.model is None else kind_of(answers.model)
    if kind is not None and kind not in recipe.models:
        raise ValueError(
            f"recipe {recipe.name} is for the kind {' or '.join(recipe.models)}, and the model is: {kind}"
        )
    if answers.processes is not None and answers.processes < recipe.processes:
        raise ValueError(f"recipe {recipe.name} needs {recipe.processes} processes, not {answers.processes}")


def _is_about_adapters(config: Mapping[str, Any]) -> bool:
    """Whether the block is for a model with adapters, which the folder of its base does not have."""
    from ds_compress.errors import ROOT

    weights = config[ROOT].get("weight_quantization") or {}
    return (weights.get("shared_parameters") or {}).get("frozen_weights") == "packed"


def _try_on(folder: str, config: Mapping[str, Any]) -> None:
    """Raises ConfigError for what the block cannot do to this model."""
    from ds_compress.api import plan
    from ds_compress.cli.models import skeleton

    plan(skeleton(Path(folder)), config)


def _overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`a.b=1` as {"a": {"b": 1}}; a value is JSON, or else a string.

    Raises:
        ValueError: it has no value, or two.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        path, equals, text = pair.partition("=")
        *outer, key = path.split(".")
        inner = overrides
        for step in outer:
            inner = inner.setdefault(step, {}) if isinstance(inner, dict) else inner
        if not equals or not all(path.split(".")) or not isinstance(inner, dict) or key in inner:
            raise ValueError(f"--set {pair}: say KEY=VALUE once, e.g. distillation.task_loss_weight=1")
        try:
            inner[key] = json.loads(text)
        except ValueError:
            inner[key] = text
    return overrides


def _one_line(problem: Any) -> str:
    hint = f" ({problem.hint})" if problem.hint else ""
    return f"{problem.path}: {problem.got}; allowed: {problem.allowed}{hint}"
