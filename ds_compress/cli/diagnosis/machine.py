"""The machine: system, processor, memory, devices."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from ds_compress.cli.diagnosis.section import Section
from ds_compress.cli.diagnosis.versions import Imports

_INSTRUCTIONS = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "AVX-512 VNNI": ("avx512_vnni",),
    "AVX VNNI": ("avx_vnni",),
    "AVX-512 bf16": ("avx512_bf16",),
    "AMX int8": ("amx_tile", "amx_int8"),
    "AMX bf16": ("amx_tile", "amx_bf16"),
}
"""By the names of Linux in /proc/cpuinfo."""
_GIB = 2**30


def look(section: Section, imports: Imports) -> None:
    """Adds what the machine has; a limit of the container is shown beside the machine's own figure."""
    section.add("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    info = _cpuinfo()
    section.add("CPU", info.get("model name") or platform.processor() or platform.machine())
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cpu_quota()
    limit = f", limited to the time of {quota:g} by the container" if quota else ""
    section.add(
        "cores",
        f"{count} of {os.cpu_count()}{limit}",
        {"usable": count, "all": os.cpu_count(), "quota": quota},
    )
    _memory(section)
    flags = set(info.get("flags", "").split())
    has = {name: flags >= set(needed) for name, needed in _INSTRUCTIONS.items()}
    names = [name for name, there in has.items() if there]
    words = ", ".join(names) or ("none of those that kernels look for" if flags else "unknown on this system")
    section.add("instructions", words, has if flags else {})
    if imports.can_use("torch"):
        _devices(section)
    else:
        section.add("CUDA devices", "unknown: torch cannot be imported")


def _memory(section: Section) -> None:
    facts = _keyed(Path("/proc/meminfo"))
    total, free = (_kib(facts.get(key, "")) for key in ("MemTotal", "MemAvailable"))
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    if total is None:
        section.add("memory", "unknown on this system", {})
        return
    capped = f", limited to {limit / _GIB:.1f} GiB by the container" if limit and limit < total else ""
    words = f"{total / _GIB:.1f} GiB, {(free or 0) / _GIB:.1f} GiB free{capped}"
    section.add("memory", words, {"bytes": total, "free_bytes": free, "limit_bytes": limit})
    with contextlib.suppress(OSError):
        shared = shutil.disk_usage("/dev/shm")
        words = f"{shared.total / _GIB:.1f} GiB, {shared.free / _GIB:.1f} GiB free"
        section.add("shared memory", words, {"bytes": shared.total, "free_bytes": shared.free})


def _devices(section: Section) -> None:
    import torch

    cuda = torch.version.cuda
    section.add("CUDA of torch", cuda or "none: this torch is built for the CPU", {"version": cuda})
    count = torch.cuda.device_count() if cuda else 0
    devices: list[dict[str, Any]] = []
    for index in range(count):
        found = torch.cuda.get_device_properties(index)
        device = {
            "name": found.name,
            "compute_capability": f"{found.major}.{found.minor}",
            "bytes": found.total_memory,
        }
        devices.append(device)
        words = f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / _GIB:.0f} GiB"
        section.add(f"CUDA device {index}", words, device)
    if not devices:
        driver = shutil.which("nvidia-smi") is not None
        why = " (nvidia-smi is here: there may be one that this torch cannot use)" if driver else ""
        section.add("CUDA devices", f"none{why}", [])


def _cpuinfo() -> dict[str, str]:
    """Of the first processor that Linux lists."""
    return _keyed(Path("/proc/cpuinfo"))


def _keyed(path: Path) -> dict[str, str]:
    """`key : value` lines; of a key that comes again, the first."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            key, colon, value = line.partition(":")
            if colon:
                found.setdefault(key.strip(), value.strip())
    return found


def _kib(text: str) -> int | None:
    found = re.fullmatch(r"(\d+) kB", text)
    return int(found[1]) * 1024 if found else None


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _cpu_quota() -> float | None:
    """Cores' worth of time that a container may use, by cgroup v2; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    return None
