"""Where the library's lines go: standard error, once, from process 0, unless the application configured logging.

Everything here logs to the logger `ds_compress`. Python shows no INFO lines unless somebody asks for them, and a line
that tells how a run is compressed must not depend on that, so this package gives its logger a handler of its own:

- lines from INFO on are shown; the environment variable `DS_COMPRESS_LOG_LEVEL` (debug, info, warning, error) or
  `logging.getLogger("ds_compress").setLevel` says otherwise;
- only process 0 speaks, but errors come from every process, as does a record with `extra={"every_process": True}`;
- an application whose root logger has handlers gets the lines there, in its own format, and not twice.
"""

from __future__ import annotations

import logging
import os
import sys
from types import TracebackType

NAME = "ds_compress"
VARIABLE = "DS_COMPRESS_LOG_LEVEL"
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def set_up() -> None:
    """Gives the logger its level, filter and handler; idempotent, and a level that is already set stays."""
    logger = logging.getLogger(NAME)
    if any(isinstance(handler, _OwnHandler) for handler in logger.handlers):
        return
    logger.addHandler(_OwnHandler())
    logger.addFilter(from_process_0)
    wish = os.environ.get(VARIABLE, "").strip().lower()
    if wish in _LEVELS:
        logger.setLevel(_LEVELS[wish])
    elif logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if wish and wish not in _LEVELS:
        logger.warning("%s=%s is not one of %s: info is used", VARIABLE, wish, ", ".join(_LEVELS))


def print_one_traceback() -> None:
    """A ConfigError is the same in every process: process 0 prints its traceback, each other one a line. Idempotent."""
    previous = sys.excepthook
    if getattr(previous, "_ds_compress", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        from ds_compress.errors import ConfigError

        if isinstance(error, ConfigError) and rank() != 0:
            count = len(error.problems)
            print(
                f"{NAME}: process {rank()} ends by the same ConfigError as process 0 "
                f"({count} problem{'s' if count > 1 else ''}, the first at {error.problems[0].path})",
                file=sys.stderr,
            )
        else:
            previous(kind, error, traceback)

    hook._ds_compress = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def from_process_0(record: logging.LogRecord) -> bool:
    """Whether a record is for the user: those of the other processes say the same once more."""
    return record.levelno >= logging.ERROR or getattr(record, "every_process", False) or rank() == 0


def rank() -> int:
    """This process's rank: of the process group, or, before there is one, as the launcher said."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    try:
        return int(os.environ.get("RANK", "0"))
    except ValueError:
        return 0


class _OwnHandler(logging.StreamHandler):
    """Writes to what is standard error at that moment, and leaves the line to the root logger's handlers if any."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_Format())

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        self.stream = sys.stderr
        super().emit(record)


class _Format(logging.Formatter):
    """`ds_compress: text`, with the level where it is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).removeprefix(f"{NAME}: ")
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{NAME}: {level}{text}"
