"""Which compiled library may be loaded: one that nobody else could have put there, and that is whole.

To load a library is to run it. So one from the cache is taken only when

- it is a plain file, no link, and it and its folder belong to this user or to root;
- nobody else may write to either. A group may where it is the owner's private one (Debian's and Fedora's umask 002): it
  bears the owner's name, is the owner's primary group, and lists nobody else;
- no folder above is writable for everybody, unless it is sticky as /tmp is.

Anything else is `UnsafeLibraryError`, and nothing is loaded, repaired or deleted: who else can write there is for the
user to find out. Links on the way to the folder are followed first; what they lead to is checked and loaded.

The file `NAME.so.sha256` beside a library, in the format of `sha256sum`, is written with it and finds damage: a full
disk, a bad copy. It is no protection by itself; the owner and the mode are.

Imports nothing of ours, for the same reason as `build`.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import os
import pwd
import stat
from pathlib import Path


class UnsafeLibraryError(RuntimeError):
    """Others could have written the library that would be loaded; the message has the path, why, and the ways out."""


def make_safe_folder(folder: Path) -> Path:
    """Creates `folder` and what is missing above it, writable for its owner alone whatever the umask, and checks it.

    Returns: the folder without links in its path.

    Raises:
        UnsafeLibraryError: see the module.
        OSError: it cannot be made.
    """
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o755, exist_ok=True)
    return safe_folder(folder)


def safe_folder(folder: Path) -> Path:
    """`folder` without links in its path; raises UnsafeLibraryError when others may write to it."""
    folder = folder.resolve()
    _check(folder, folder.stat())
    for above in folder.parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise _unsafe(above, "may be written by everybody")
    return folder


def check_file(library: Path) -> None:
    """Raises UnsafeLibraryError unless `library`, of a safe folder, is a file that nobody else may write."""
    found = library.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise _unsafe(library, "is a link" if stat.S_ISLNK(found.st_mode) else "is no file")
    _check(library, found)


def write_checksum(library: Path, place: Path) -> None:
    """Beside `place`, where `library` will be moved. Whoever reads between the two finds damage, and waits his turn."""
    temporary = library.with_name(checksum_file(library).name)
    temporary.write_text(f"{_sha256(library)}  {place.name}\n")
    os.replace(temporary, checksum_file(place))


def damage(library: Path) -> str | None:
    """What is wrong with a library that is there; None when it is what was built."""
    try:
        expected = checksum_file(library).read_text().split()
    except (FileNotFoundError, UnicodeDecodeError):
        return "has no checksum beside it"
    return None if expected[:1] == [_sha256(library)] else "differs from its checksum"


def checksum_file(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise _unsafe(path, f"belongs to {_user_name(found.st_uid)}, not to you")
    if found.st_mode & stat.S_IWOTH:
        raise _unsafe(path, "may be written by everybody")
    if found.st_mode & stat.S_IWGRP and not _is_private_group(found.st_gid, found.st_uid):
        raise _unsafe(path, f"may be written by the group {_group_name(found.st_gid)}")


def _is_private_group(gid: int, uid: int) -> bool:
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    return (
        gid == user.pw_gid
        and group.gr_name == user.pw_name
        and {*group.gr_mem, user.pw_name} == {user.pw_name}
    )


def _user_name(uid: int) -> str:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return f"the user {uid}"


def _group_name(gid: int) -> str:
    with contextlib.suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)


def _unsafe(path: Path, why: str) -> UnsafeLibraryError:
    return UnsafeLibraryError(
        f"native ops are not loaded: {path} {why}, and whoever can write there can run code in this process. "
        "Look who made it; then delete it or take the rights away (chmod go-w), or set DS_COMPRESS_CACHE to a folder "
        "of your own, or set DS_COMPRESS_KERNELS=reference to run on plain torch."
    )
