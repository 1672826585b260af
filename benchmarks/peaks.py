"""The measured ceilings of this CPU: fp32 and integer multiplications, and reading a working set of a given size.

`peaks.cpp` is compiled for the instruction set in use and called through ctypes, which lets threads run side by side.
Each thread's own CPU time counts, so that a busy machine does not lower the ceiling.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from .record import instruction_set

FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"],
}
TRIES = 7


@dataclass(frozen=True)
class Peaks:
    """Rates of `threads` cores together: operations per second, a multiplication and an addition being two."""

    threads: int
    fp32: float
    int8: float
    int4: float

    @classmethod
    def measure(cls, threads: int) -> Peaks | None:
        """None where there is nothing to measure with (no x86-64, no compiler)."""
        functions = _library()
        if functions is None:
            return None
        work = [getattr(functions, f"dsc_peak_{name}") for name in ("fp32", "int8", "int4")]
        rates = [_rate(partial(peak, 200_000), threads) for peak in work]
        return cls(threads, *rates)


@cache
def read_bandwidth(size: int, threads: int) -> float:
    """Bytes per second of reading `size` bytes again and again, each of the threads its own part; 0.0 if unknown."""
    functions = _library()
    if functions is None:
        return 0.0
    part = max(512, size // threads // 512 * 512)
    data = [torch.ones(part, dtype=torch.uint8) for _ in range(threads)]
    times = max(1, 20_000_000 // part)
    pointers = iter([ctypes.c_void_p(d.data_ptr()) for d in data] * (TRIES + 1))
    return _rate(lambda: functions.dsc_peak_read(times, next(pointers), ctypes.c_int64(part)), threads)


def _rate(work: Callable[[], float], threads: int) -> float:
    """The best of a few tries: a ceiling is what nothing disturbed."""

    def rate_of_one() -> float:
        begin = time.thread_time()
        done = work()
        return done / (time.thread_time() - begin)

    with ThreadPoolExecutor(threads) as pool:
        return max(
            sum(future.result() for future in [pool.submit(rate_of_one) for _ in range(threads)])
            for _ in range(TRIES)
        )


@cache
def _library() -> ctypes.CDLL | None:
    isa = instruction_set()
    if isa not in FLAGS:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peaks.so"
        source = Path(__file__).with_suffix(".cpp")
        command = [os.environ.get("CXX", "g++"), "-O2", "-shared", "-fPIC", *FLAGS[isa], str(source)]
        try:
            subprocess.run([*command, "-o", str(target)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        library = ctypes.CDLL(str(target))
    for name in ("fp32", "int8", "int4", "read"):
        getattr(library, f"dsc_peak_{name}").restype = ctypes.c_double
    return library
