"""Kernels: `kernels()` gives the ops of `schemas`, native (C++ and CUDA, built from `csrc`) or in plain torch.

    functional  the ops as typed functions, each with an example: start here
    reference   every op in plain torch; its signature is the op's
    schemas     the schemas inferred from them, with fake implementations for tracing
    checks      what arguments must be, for both
    sizes       bytes of packed weights and payloads
    library     which of the two runs, and loading
    library_file  which compiled libraries may be loaded
    build       compiling `csrc`, once per content
    toolchain   compilers and torch, found without importing torch

`python -m ds_compress.ops` builds, loads and says what runs here.
"""

from __future__ import annotations

from ds_compress.ops import functional
from ds_compress.ops.library import (
    KernelsUnavailable,
    KernelsUnavailableError,
    Preference,
    kernel_preference,
    kernels,
    prefer,
)

__all__ = [
    "KernelsUnavailable",
    "KernelsUnavailableError",
    "Preference",
    "functional",
    "kernel_preference",
    "kernels",
    "prefer",
]
