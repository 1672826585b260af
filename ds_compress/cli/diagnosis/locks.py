"""Locks of torch's extension builder, by which DeepSpeed compiles its ops.

The builder holds a file named `lock` open while it compiles, and everybody else waits until the file is gone, for ever
and without a word. A build that was killed leaves the file behind.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from ds_compress.cli.diagnosis.paste import in_shell
from ds_compress.cli.diagnosis.section import Section

_YOUNG_S = 1800


@dataclass(frozen=True)
class Lock:
    """op: what is compiled. age_s: seconds. holder: the process that has the file open; None: none was seen. seen_all:
    whether every process of this machine could be looked at."""

    path: Path
    op: str
    age_s: float
    holder: int | None
    seen_all: bool


def look(section: Section) -> None:
    root = extensions_folder()
    section.add("searched", str(root) if root.is_dir() else f"{root} (not there yet)")
    locks = list(find(root))
    data = [
        {"path": str(lock.path), "op": lock.op, "age_s": round(lock.age_s), "holder": lock.holder}
        for lock in locks
    ]
    described = [f"{lock.op}: {_age(lock.age_s)} old, {_holder(lock)}" for lock in locks]
    section.add("locks", "; ".join(described) or "none", data)
    for lock in locks:
        if lock.holder is None:
            other = ", unless another machine or container is compiling now"
            other = other if lock.age_s < _YOUNG_S or not lock.seen_all else ""
            section.find(
                f"{lock.path} is {_age(lock.age_s)} old and {_holder(lock)}: a build of {lock.op} was "
                f"killed, and every launch that needs it waits for ever{other}",
                f"rm {in_shell(lock.path)}",
            )


def extensions_folder() -> Path:
    """Where torch compiles extensions: $TORCH_EXTENSIONS_DIR, else the folder of torch in the user's cache."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "torch_extensions"


def find(root: Path) -> list[Lock]:
    """All locks: of ROOT/op, where the variable says so, and of ROOT/py311_cpu/op otherwise."""
    paths = [path for pattern in ("*/lock", "*/*/lock") for path in sorted(root.glob(pattern))]
    paths = [path for path in paths if path.is_file()]
    holders, seen_all = _open_files(paths)
    found = []
    for path in paths:
        with contextlib.suppress(OSError):  # removed meanwhile: the build has ended
            age = max(0.0, time.time() - path.stat().st_mtime)
            found.append(Lock(path, path.parent.name, age, holders.get(os.path.realpath(path)), seen_all))
    return found


def _open_files(paths: list[Path]) -> tuple[dict[str, int], bool]:
    """({real path: a process that has it open}, whether all processes could be looked at), from Linux' /proc."""
    wanted, found, seen_all = {os.path.realpath(path) for path in paths}, dict[str, int](), True
    processes = list(Path("/proc").glob("[0-9]*")) if wanted else []
    if wanted and not processes:
        return {}, False
    for process in processes:
        try:
            for entry in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(entry)
                    if target in wanted:
                        found[target] = int(process.name)
        except PermissionError:
            seen_all = False
        except OSError:  # it has ended
            continue
    return found, seen_all


def _holder(lock: Lock) -> str:
    if lock.holder is not None:
        return f"held by process {lock.holder}, which compiles"
    return "no process holds it" if lock.seen_all else "no process that may be looked at holds it"


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
