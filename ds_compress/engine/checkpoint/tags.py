"""Which checkpoint of a folder is loaded: the one asked for, or the newest that is whole.

    <save_dir>/latest                             names a tag; written by DeepSpeed, and by us in its place
    <save_dir>/<tag>/ds_compress_manifest.json    sizes and hashes of all files of the tag: see `ds_compress.manifest`

Checkpoints of plain DeepSpeed have no manifest. They are taken as they are, but for the name.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from ds_compress.engine.checkpoint.processes import Processes
from ds_compress.errors import CheckpointError
from ds_compress.files import inside, remove_unfinished, restore_folder
from ds_compress.manifest import FILE_NAME, Manifest, ManifestError

logger = logging.getLogger("ds_compress")

FOLDER = "ds_compress"
LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
_MOST_SHOWN = 3


def tag_to_load(root: Path, tag: str | None, processes: Processes, pointer: str = LATEST) -> str | None:
    """The tag in `root` that a load takes, verified; a collective that tells all processes the same.

    tag: what was asked for; None for the one that the file `pointer` names. Where that one is damaged or missing, the
    newest whole one is taken, with a warning. None is returned where there is no checkpoint at all.

    Raises:
        CheckpointError: in every process: the tag that was asked for is not whole, or none is.
    """
    if processes.leads:
        with contextlib.suppress(OSError):  # a folder that may only be read
            _tidy(root)
    pointed = processes.from_first(
        str(tag) if tag is not None else _outcome(lambda: tag_named_in(root, pointer))
    )
    if isinstance(pointed, Exception):
        raise pointed
    problems = _problems(root, pointed, pointer, processes)
    if not problems:
        if tag is None and (newer := processes.from_first(_newer(root, str(pointed), pointer))):
            logger.warning("ds_compress: %s names %s, %s is newer", root / pointer, pointed, root / newer)
        return str(pointed)
    for other in processes.from_first([name for name in by_age(root, pointer) if name != pointed]):
        if _problems(root, other, pointer, processes):
            continue
        if tag is not None:
            raise CheckpointError(
                f"{_told(problems)}. {root / other} is whole: load the tag {other!r} instead"
            )
        logger.warning("ds_compress: %s; loading %s, the newest that is whole", _told(problems), root / other)
        return str(other)
    if pointed is None and not (root / pointer).exists():
        return None
    raise CheckpointError(f"{_told(problems)}. No checkpoint in {root} is whole{_beside(root, processes)}")


def _beside(root: Path, processes: Processes) -> str:
    """Where else there is a whole one: a Trainer has a folder for each save. A collective."""
    others = {path.parent.parent for path in root.parent.glob(f"*/*/{FILE_NAME}")} - {root}
    newest_first = sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
    for other in processes.from_first(newest_first):
        if any(
            not _problems(other, tag, LATEST, processes) for tag in processes.from_first(by_age(other))[:1]
        ):
            return f"; {other} has one"
    return ""


def verified_folder(root: Path) -> Path:
    """The folder of a tag, for one process: `root` itself where it is one, else the tag that a load would take.

    Raises:
        CheckpointError: it is no checkpoint, or not whole.
    """
    if any(root.glob("*model_states.pt")) or (root / FILE_NAME).exists():
        if problems := _problems_here(root, Processes()):
            raise CheckpointError(_told(problems))
        return root
    tag = tag_to_load(root, None, Processes()) or tag_to_load(root, None, Processes(), LATEST_UNIVERSAL)
    if tag is None:
        raise CheckpointError(f"{root} is no checkpoint: it has neither a file `latest` nor model states")
    return root / tag


def _newer(root: Path, tag: str, pointer: str) -> str | None:
    """A tag that was saved as the latest after `tag`: a kill, or somebody, kept `latest` from naming it."""
    tags = by_age(root, pointer)
    newer = tags[: tags.index(tag)] if tag in tags else []
    return next((name for name in newer if _was_latest(root / name)), None)


def _was_latest(folder: Path) -> bool:
    manifest = Manifest.read(folder)
    return manifest is not None and bool(manifest.about.get("latest"))


def by_age(root: Path, pointer: str = LATEST) -> list[str]:
    """Tags with a manifest that can be read, of those that the file `pointer` may name, the newest first."""
    ages: list[tuple[Any, str]] = []
    for path in root.glob(f"*/{FILE_NAME}"):
        with contextlib.suppress(ManifestError):
            manifest = Manifest.read(path.parent)
            if manifest is None or path.parent.name.startswith("."):
                continue
            if bool(manifest.about.get("universal")) == (pointer == LATEST_UNIVERSAL):
                ages.append(((str(manifest.about.get("saved")), path.parent.name), path.parent.name))
    return [name for _, name in sorted(ages, reverse=True)]


def _tidy(root: Path) -> None:
    """Ends what a kill interrupted."""
    for left in root.glob(".*.replaced"):
        restore_folder(root / left.name[1 : -len(".replaced")])
    remove_unfinished(root)


def tag_named_in(root: Path, pointer: str) -> str | None:
    """The tag that the file names; None where it is missing or empty."""
    try:
        tag = (root / pointer).read_text(encoding="utf-8").strip()
        return tag if not tag else inside(root, tag).relative_to(root).as_posix()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{root / pointer}: {error}") from error


def _outcome(call: Any) -> Any:
    """What it returns, or the error, for the other processes to raise, too."""
    try:
        return call()
    except CheckpointError as error:
        return error


def _problems(root: Path, tag: str | None, pointer: str, processes: Processes) -> list[str]:
    """What all processes together find wrong with a tag; a collective."""
    if not tag:
        return [f"{root / pointer} names no checkpoint"]
    own = _problems_here(root / tag, processes)
    return list(dict.fromkeys(words for found in processes.gather(own) for words in found))


def _problems_here(folder: Path, processes: Processes) -> list[str]:
    if not folder.is_dir():
        return [f"{folder} is missing"]
    try:
        manifest = Manifest.read(folder)
    except ManifestError as error:
        return [str(error)]
    if manifest is not None:
        return manifest.problems(folder, processes.part, processes.parts)
    if (folder / FOLDER).exists():
        return [f"{folder / FILE_NAME} is missing beside {FOLDER}: the checkpoint is incomplete"]
    return []


def _told(problems: list[str]) -> str:
    more = len(problems) - _MOST_SHOWN
    return "; ".join(problems[:_MOST_SHOWN]) + (f"; and {more} more files" if more > 0 else "")
