"""An output folder that appears as a whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from ds_compress.errors import ExportError


class UnfinishedFolder:
    """A temporary folder beside `out`, renamed to it by `finish` and removed when the block ends without.

    Raises:
        ExportError: `out` exists, is no empty folder, and may not be overwritten.
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        if out.exists() and not overwrite and not _is_empty_folder(out):
            raise ExportError(f"{out} exists: give another folder, or overwrite=True")
        self.out = out

    def __enter__(self) -> UnfinishedFolder:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def finish(self) -> None:
        """Under its final name from here on."""
        self.path.chmod(0o755)
        if self.out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-old-", dir=self.out.parent))
            self.out.rename(old / self.out.name)
            self.path.rename(self.out)
            shutil.rmtree(old)
        else:
            self.path.rename(self.out)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
