"""Whether an export is what was written: its manifest, and who may be replaced."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from ds_compress.errors import ExportError
from ds_compress.export.report import FILE_NAME as REPORT
from ds_compress.manifest import FILE_NAME, Manifest, ManifestError

logger = logging.getLogger("ds_compress")


def seal(folder: Path) -> None:
    """Writes the manifest of an export; again when its report has changed, without reading the other files again."""
    before = Manifest.read(folder)
    known = {} if before is None else {n: entry for n, entry in before.files.items() if n != REPORT}
    Manifest.of(folder, {}, known).write(folder)


def refuse_damaged(folder: Path, only: Iterable[Path] | None = None) -> None:
    """Compares an export with its manifest; without one there is a warning.

    only: files of it that are about to be read, where others may be absent: a hub's cache has what was asked for.

    Raises:
        ExportError: it names the files that are not as they were written.
    """
    try:
        manifest = Manifest.read(folder)
    except ManifestError as error:
        raise ExportError(str(error)) from error
    if manifest is None:
        if only is None:
            logger.warning("ds_compress: %s has no %s: whether it is whole is unknown", folder, FILE_NAME)
        return
    if only is not None:
        names = {path.name for path in only}
        manifest = Manifest({}, {n: entry for n, entry in manifest.files.items() if n in names})
    if problems := manifest.problems(folder):
        raise ExportError(
            f"{'; '.join(problems[:3])}. Export again; if you have changed it yourself, delete {folder / FILE_NAME}"
        )


def refuse_foreign(out: Path) -> None:
    """Only an export is replaced: nobody wants to lose a folder that was named by mistake.

    Raises:
        ExportError: the folder has something else in it.
    """
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / REPORT).exists())):
        raise ExportError(f"{out} is no export of ds_compress, and is not replaced: give another folder")
