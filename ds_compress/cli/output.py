"""What a command prints: words for a person, or with `--json` one object on standard output and nothing else there.

Libraries print to standard output as they like, DeepSpeed a line at its import. While a command with `--json` works,
whatever they and their child processes write goes to standard error.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console

from ds_compress.cli.errors import one_line_errors
from ds_compress.sheet import uncut

AsJson = Annotated[
    bool, typer.Option("--json", help="print one JSON object, and nothing else to standard output")
]


@dataclass
class Output:
    """What one command says: `say` and `show` for a person, `done` for a program; each does nothing for the other."""

    as_json: bool
    result: Mapping[str, Any] | None = None

    def say(self, line: str) -> None:
        """One line, as it is."""
        if not self.as_json:
            typer.echo(line)

    def show(self, what: Any) -> None:
        """A report that prints itself by rich."""
        if not self.as_json:
            (Console() if sys.stdout.isatty() else uncut()).print(what)

    def done(self, **result: Any) -> None:
        """The result, whose keys `cli.results` describes."""
        self.result = result


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[Output]:
    """The work of a command: its errors are one line, and with `as_json` its result is printed at the end."""
    made = Output(as_json)
    with stdout_to_stderr(as_json), one_line_errors():
        yield made
    if as_json:
        assert made.result is not None
        print_json({"ok": True, **made.result})


def print_json(result: Mapping[str, Any]) -> None:
    """`result` as JSON on standard output. NaN and Inf, which JSON does not have, are strings."""
    typer.echo(json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False))


@contextlib.contextmanager
def stdout_to_stderr(when: bool = True) -> Iterator[None]:
    """Inside, standard output of this process and of its children is standard error; nothing where `when` is false."""
    if not when:
        yield
        return
    sys.stdout.flush()
    saved = None
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        saved = os.dup(1)
        os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
