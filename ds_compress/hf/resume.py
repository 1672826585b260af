"""`Trainer.train(resume_from_checkpoint=True)` resumes from the newest checkpoint that is whole.

A Trainer's `checkpoint-N` holds the engine's checkpoint and files of the Trainer's own, written one after the other: a
kill leaves a folder with the highest number and without its end, which transformers would choose.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ds_compress.engine.checkpoint import tags
from ds_compress.engine.checkpoint.processes import Processes
from ds_compress.errors import CheckpointError
from ds_compress.manifest import FILE_NAME

logger = logging.getLogger("ds_compress")

_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def join_every_trainer(module: ModuleType) -> None:
    """module: `transformers.trainer`."""
    module.get_last_checkpoint = functools.wraps(module.get_last_checkpoint)(  # type: ignore[attr-defined]
        functools.partial(newest_whole, otherwise=module.get_last_checkpoint)
    )


def newest_whole(folder: str, otherwise: Callable[[str], str | None]) -> str | None:
    """The `checkpoint-N` in `folder` to resume from; a collective.

    otherwise: what answers where no checkpoint is of a compressed training.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    numbered = [(int(m[1]), path) for path in Path(folder).iterdir() if (m := _NAME.fullmatch(path.name))]
    newest_first = [path for _, path in sorted(numbered, reverse=True) if path.is_dir()]
    if not any(next(path.glob(f"*/{FILE_NAME}"), None) for path in newest_first):
        return otherwise(folder)
    problems: list[str] = []
    for path in newest_first:
        problem = _problem_of(path)
        if not problem:
            if problems:
                logger.warning("ds_compress: %s; resuming from %s", "; ".join(problems), path)
            return str(path)
        problems.append(problem)
    raise CheckpointError(f"no checkpoint in {folder} is whole: {'; '.join(problems)}")


def _problem_of(checkpoint: Path) -> str:
    """Why it cannot be resumed from; the engine's part first, which all processes check together."""
    try:
        if tags.tag_to_load(checkpoint, None, Processes.of()) is None:
            return f"{checkpoint} has no state of the engine"
    except CheckpointError as error:
        return str(error)
    if not (checkpoint / _STATE).exists():
        return f"{checkpoint / _STATE} is missing"
    for path in sorted(checkpoint.glob("*")):
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"{path} is damaged"
        if path.suffix == ".json" and not _is_json(path):
            return f"{path} is damaged"
    return ""


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True
