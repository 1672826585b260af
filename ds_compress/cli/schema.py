"""`ds_compress schema`: the JSON schema of a DeepSpeed config with a `compression_training` block, for editors."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from ds_compress.files import atomic_write


def schema(
    out: Annotated[
        Path | None, typer.Option(help="file to write; without it the schema goes to standard output")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace OUT if something else is in it")
    ] = False,
) -> None:
    """Prints or writes the JSON schema by which an editor completes and checks `compression_training`.

    It describes the blocks that this version ships; those of `register_technique` are not in it.
    """
    text = shipped_schema()
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        if out.exists() and out.read_bytes() != text.encode() and not overwrite:
            raise OSError(f"{out} exists: give another file, or --overwrite")
        atomic_write(out, text)
    except OSError as error:
        typer.echo(f"ds_compress: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(
        f'written to {out}: a DeepSpeed JSON beside it names it by "$schema": {json.dumps(f"./{out.name}")}'
    )


def shipped_schema() -> str:
    """The file of the package, read without importing what it was made from."""
    file = resources.files("ds_compress") / "config" / "schema" / "compression_training.schema.json"
    return file.read_text(encoding="utf-8")
