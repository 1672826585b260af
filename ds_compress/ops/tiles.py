"""Whether this CPU multiplies int8 values in tiles (AMX), which changes what is worth doing without them."""

from __future__ import annotations

import functools
import os
from pathlib import Path


@functools.cache
def has_int8_tiles() -> bool:
    """Whether `int8_linear` on the CPU uses AMX: what csrc/cpu/isa.cpp asks the processor, from Linux' list of it."""
    if os.environ.get("DS_COMPRESS_CPU_ISA"):
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    return {"amx_tile", "amx_int8", "avx512_vnni", "avx512vl"} <= flags
