"""Files and folders that appear complete or not at all, and names of files that other files give."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
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
    """Replaces the file `path`: a reader finds the old file or the new one, also after a kill or a loss of power.

    Args:
        content: text (written as UTF-8), bytes, or what writes a file at the path that it is called with.
    """
    temporary, lock = _begin(path, secrets.token_hex(4), Path.touch)
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk; where a file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def replace_folder(new: Path, out: Path) -> None:
    """Renames the folder `new` to `out`; what was there is replaced at once where the kernel can exchange two names.

    Elsewhere `out` is missing for a moment, and `restore_folder(out)` brings the old one back after a kill in it.
    """
    old = _old_of(out)
    shutil.rmtree(old, ignore_errors=True)
    if not out.exists():
        new.rename(out)
    elif _exchange(new, out):
        new.rename(old)
    else:
        out.rename(old)
        new.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(out: Path) -> None:
    """Ends a `replace_folder(_, out)` that was killed: `out` is the old folder or the new one, the other is gone."""
    old = _old_of(out)
    if old.is_dir():
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)


def _old_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names at once (renameat2 of Linux); False where that is not possible."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def remove_unfinished(parent: Path, name: str | None = None) -> None:
    """Removes what killed writers left in the folder: all of it, or that of what is called `name`.

    The kernel drops the lock of a process that dies, and whoever still writes holds it.
    """
    pattern = "*" if name is None else glob.escape(name)
    for left in parent.glob(f".{pattern}.unfinished-*"):
        if (lock := _locked(left)) is not None:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
            os.close(lock)


def _begin(path: Path, nonce: str, make: Callable[[Path], object]) -> tuple[Path, int | None]:
    """A hidden name beside `path`, made and locked; None for the lock where the file system knows none."""
    remove_unfinished(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.unfinished-{nonce}")
    while True:
        make(temporary)
        lock = _locked(temporary)
        # Somebody may have taken it for a dead one's before it was locked.
        if lock is None or temporary.exists():
            return temporary, lock
        os.close(lock)


class UnfinishedFolder:
    """A temporary folder beside `out`, renamed to it by `finish` and removed when the block ends without.

    nonce: makes its name, for several processes that have to agree on it without having seen the folder.
    """

    def __init__(self, out: Path, nonce: str | None = None) -> None:
        self.out, self._nonce = out, nonce or secrets.token_hex(4)
        self.path = out.with_name(f".{out.name}.unfinished-{self._nonce}")
        self._lock: int | None = None

    def __enter__(self) -> UnfinishedFolder:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        restore_folder(self.out)
        self.path, self._lock = _begin(self.out, self._nonce, Path.mkdir)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def finish(self) -> None:
        """Under its final name from here on, and on the disk; what was there is gone."""
        for path in self.path.rglob("*"):
            sync(path)
        sync(self.path)
        replace_folder(self.path, self.out)


def _locked(path: Path) -> int | None:
    """An open lock on a file or folder; None when another process has it, it is gone, or there are no locks."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
