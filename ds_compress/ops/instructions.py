"""What this CPU multiplies with, where that changes what is worth doing: csrc/cpu/isa.cpp asks the processor itself."""

from __future__ import annotations

import functools
import os
from pathlib import Path

_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}


def has_avx512() -> bool:
    """Whether the kernels of the CPU use AVX-512."""
    return (os.environ.get("DS_COMPRESS_CPU_ISA") or "avx512") == "avx512" and _flags() >= _AVX512


def has_int8_tiles() -> bool:
    """Whether `int8_linear` on the CPU uses AMX."""
    return not os.environ.get("DS_COMPRESS_CPU_ISA") and _flags() >= {"amx_tile", "amx_int8", *_AVX512}


@functools.cache
def _flags() -> set[str]:
    """From Linux' list of what the processor has; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())
