"""A command and the example in its `--help`, added to the app together."""

from __future__ import annotations

from collections.abc import Callable

import typer


def add(app: typer.Typer, function: Callable[..., None], example: str) -> None:
    """`function` becomes a command of `app`, whose help ends with `example`, a line that begins with `ds_compress`."""
    # An empty line is what typer keeps between the two.
    app.command(epilog=f"Example:\n\n{example}")(function)
