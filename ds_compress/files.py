"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType


def atomic_write(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Replaces the file `path`: a reader finds the old file or the new one, also after a kill.

    Args:
        content: text (written as UTF-8), bytes, or what writes a file at the path that it is called with.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


class UnfinishedFolder:
    """A temporary folder beside `out`, renamed to it by `finish` and removed when the block ends without."""

    def __init__(self, out: Path) -> None:
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
        """Under its final name from here on; what was there is gone."""
        self.path.chmod(0o755)
        if self.out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-old-", dir=self.out.parent))
            self.out.rename(old / self.out.name)
            self.path.rename(self.out)
            shutil.rmtree(old)
        else:
            self.path.rename(self.out)
