"""`ds_compress migrate`: an old DeepSpeed JSON becomes one for this library, with what changes said line by line."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ds_compress.cli.output import AsJson, print_json, stdout_to_stderr
from ds_compress.errors import ConfigError, Problem
from ds_compress.files import atomic_write

if TYPE_CHECKING:
    from ds_compress.compat.migrate import Note


def migrate(
    config: Annotated[Path, typer.Argument(help="old DeepSpeed JSON, or its compression_training block")],
    output: Annotated[
        Path | None, typer.Option(help="file to write; without it the new JSON goes to standard output")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing OUTPUT")] = False,
    as_json: AsJson = False,
) -> None:
    """Rewrites a JSON of the removed deepspeed.compression (or MoQ), and explains what changes."""
    with stdout_to_stderr(as_json):
        from ds_compress.compat.migrate import migrate as run
        from ds_compress.config.schema.source import read_json

    try:
        if output is not None and output.exists() and not overwrite:
            raise OSError(f"{output} exists: give another file, or --overwrite")
        result = run(read_json(str(config)))
        text = json.dumps(result.config, indent=2, ensure_ascii=False) + "\n"
        if output is not None:
            atomic_write(output, text)
    except ConfigError as error:
        raise _refused("; ".join(_one_line(problem) for problem in error.problems)) from None
    except OSError as error:
        raise _refused(str(error)) from None
    if as_json:
        notes = [{"path": note.path, "kind": note.kind.value, "text": note.text} for note in result.notes]
        written = None if output is None else str(output)
        print_json({"ok": True, "config": result.config, "notes": notes, "written": written})
        return
    if output is None:
        typer.echo(text, nl=False)
    # Explanations must not get between the braces of a JSON that is piped on.
    for line in _explanation(result.notes, output):
        typer.echo(line, err=output is None)


def _explanation(notes: Sequence[Note], output: Path | None) -> Iterator[str]:
    for note in notes:
        yield f"{note.kind.value:8}{note.path}"
        yield textwrap.indent(textwrap.fill(note.text, 100), " " * 8)
    if not any(note.kind == "changed" for note in notes):
        yield "nothing to change: the JSON is one for ds_compress as it is"
    if output is not None:
        yield f"written to {output}"


def _one_line(problem: Problem) -> str:
    hint = f" ({problem.hint})" if problem.hint else ""
    return f"{problem.path}: {problem.got}; allowed: {problem.allowed}{hint}"


def _refused(message: str) -> typer.Exit:
    typer.echo(f"ds_compress: {' '.join(message.split())}", err=True)
    return typer.Exit(2)
