"""What a user did wrong, in one line and exit status 2; what was tampered with, 1; a key that is missing, 3.

Everything else keeps its traceback.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    import ds_compress
    from ds_compress.errors import CheckpointError, ConfigError, ExportError
    from ds_compress.secure.errors import KeyUnavailableError, NotInstalledError, SecurityError

    try:
        # Deferred for `--help`: see ds_compress.public.
        ds_compress.complete()
        yield
    except SecurityError as error:
        print(f"ds_compress: {error}", file=sys.stderr)
        raise typer.Exit(3 if isinstance(error, KeyUnavailableError) else 1) from None
    except (CheckpointError, ExportError, ConfigError, NotInstalledError, OSError, ValueError) as error:
        print(f"ds_compress: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
