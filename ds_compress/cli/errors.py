"""What a user did wrong, in one line and exit status 2; everything else keeps its traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    from ds_compress.errors import ConfigError, ExportError

    try:
        yield
    except (ExportError, ConfigError, OSError, ValueError) as error:
        print(f"ds_compress: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
