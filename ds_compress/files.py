"""Files and folders that appear complete or not at all, and names of files that other files give."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def inside(folder: Path, name: object) -> Path:
    """The file `name` of `folder`, as an index or a manifest names it, which anybody may have written.

    The name decides, not what lies there: files of a hub's cache are links to elsewhere.

    Raises:
        ValueError: it is no name of a file inside the folder.
    """
    if isinstance(name, str) and name and "\0" not in name:
        posix, windows = PurePosixPath(name), PureWindowsPath(name)
        leaves = ".." in posix.parts or ".." in windows.parts
        if not (leaves or posix.is_absolute() or windows.drive or windows.root):
            return folder / name
    raise ValueError(f"{name!r} is no file inside of {folder}")


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file that whoever may read other new files can read: the library's own are its owner's alone."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


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
