"""The files of a run: a checkpoint of DeepSpeed's with our state in it, an export, or a folder that has both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ds_compress.engine.checkpoint import tags
from ds_compress.errors import CheckpointError
from ds_compress.export.report import FILE_NAME as EXPORT
from ds_compress.manifest import Manifest, ManifestError


@dataclass(frozen=True)
class Sources:
    """checkpoint: the folder of one tag. export: a folder with `ds_compress.json`. Either may be None, not both.

    passed_over: other checkpoints beside it.
    """

    checkpoint: Path | None
    export: Path | None
    passed_over: tuple[Path, ...] = ()


def find(run: Path) -> Sources:
    """What `run` is, or else what the folders in it are: of several checkpoints the newest.

    Raises:
        CheckpointError: a checkpoint in it has no state of ours, or is damaged.
        ValueError: there is neither, or more than one export.
    """
    if not run.is_dir():
        raise ValueError(f"{run}: there is no such folder")
    checkpoint, export = _checkpoint(run), run if (run / EXPORT).is_file() else None
    if checkpoint is not None or export is not None:
        return Sources(checkpoint, export)
    folders = sorted(path for path in run.iterdir() if path.is_dir() and not path.name.startswith("."))
    exports = [path for path in folders if (path / EXPORT).is_file()]
    if len(exports) > 1:
        names = ", ".join(path.name for path in exports[:5])
        raise ValueError(f"{run} has {len(exports)} exports, {names}: name each as a run of its own")
    found = [checkpoint for path in folders if (checkpoint := _checkpoint(path)) is not None]
    if not found and not exports:
        raise ValueError(
            f"{run} is neither a checkpoint (a file `latest`, or the folder of a tag) nor an export ({EXPORT}), and no "
            "folder in it is"
        )
    newest = max(found, key=_saved, default=None)
    return Sources(newest, exports[0] if exports else None, tuple(path for path in found if path != newest))


def refuse_damaged(folder: Path, names: list[str]) -> None:
    """Compares the files of a checkpoint that are about to be read with its manifest; others may be terabytes.

    Raises:
        CheckpointError: one is not as it was written.
    """
    try:
        manifest = Manifest.read(folder)
    except ManifestError as error:
        raise CheckpointError(str(error)) from error
    if manifest is None:
        raise CheckpointError(f"{folder} has no manifest: the checkpoint is incomplete")
    entries = {name: entry for name, entry in manifest.files.items() if name in names}
    if problems := Manifest({}, entries).problems(folder):
        raise CheckpointError("; ".join(problems[:3]))


def _checkpoint(path: Path) -> Path | None:
    if (path / tags.FOLDER).is_dir():
        return path
    for pointer in (tags.LATEST, tags.LATEST_UNIVERSAL):
        if not (path / pointer).is_file():
            continue
        tag = tags.tag_named_in(path, pointer)
        if not tag or not (path / tag).is_dir():
            whole = tags.by_age(path, pointer)
            if not whole:
                raise CheckpointError(f"{path / pointer} names no checkpoint, and there is no other")
            tag = whole[0]
        if not (path / tag / tags.FOLDER).is_dir():
            raise CheckpointError(
                f"{path / tag} has no compression state: it is a checkpoint of plain DeepSpeed"
            )
        return path / tag
    return None


def _saved(checkpoint: Path) -> str:
    try:
        manifest = Manifest.read(checkpoint)
    except ManifestError:
        return ""
    return "" if manifest is None else str(manifest.about.get("saved", ""))
