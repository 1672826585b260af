"""`ds_compress validate`: what the start of a training would refuse, without the training."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ds_compress.cli.errors import one_line_errors
from ds_compress.cli.output import AsJson, print_json, stdout_to_stderr


def validate(
    config: Annotated[Path, typer.Argument(help="DeepSpeed JSON, or its compression_training block")],
    model: Annotated[
        Path | None, typer.Option(help="folder of a transformers model; its weights are not read")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Checks a config as the start of a training does, and lists all that is wrong with it.

    The block, the DeepSpeed part around it, what the two do not do together, and with --model what the block asks of
    that model. Exit status 0: valid; 1: not valid, with the problems on standard error.
    """
    with stdout_to_stderr(), one_line_errors():
        from ds_compress.config.schema.source import read_json
        from ds_compress.engine.preflight import Preflight, preflight
        from ds_compress.errors import ConfigError

        if not config.is_file():
            raise OSError(f"{config}: there is no such file")
        found = Preflight()
        try:
            content = read_json(str(config))
        except ConfigError as broken:
            found.problems += broken.problems
        else:
            found = preflight(content, _skeleton(model))
        error = ConfigError(found.problems) if found.problems else None
    enabled = sorted(found.config.enabled_blocks()) if found.config is not None else []
    if as_json:
        problems = [asdict(problem) for problem in found.problems]
        checked = None if model is None else str(model)
        result = {"ok": error is None, "config": str(config), "model": checked, "problems": problems}
        print_json({**result, "enabled_blocks": enabled, "notes": found.notes})
    elif error is None:
        beside = f" for {model}" if model is not None else ""
        typer.echo(f"valid: {config}{beside}: {', '.join(enabled) or 'nothing is enabled'}")
    if not as_json:
        for note in found.notes:
            typer.echo(f"note: {note}")
    if error is not None:
        typer.echo(f"ds_compress: {config}: {error}", err=True)
        raise typer.Exit(1)


def _skeleton(model: Path | None) -> Any:
    if model is None:
        return None
    from ds_compress.cli.models import skeleton

    return skeleton(model)
