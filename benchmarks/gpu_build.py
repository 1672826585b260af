"""First part of `gpu_check`: the native library is built for this machine and loads.

python -m benchmarks.gpu_parts build --output FILE
"""

from __future__ import annotations

import os
import time

import torch

from .record import Figures


def measure(device: torch.device, quick: bool) -> Figures:
    """Seconds of the build (about none when it was built before) and how many ops have no kernel for `device`.

    Raises:
        RuntimeError: the library could not be built or loaded.
    """
    if device.type == "cuda":
        os.environ["DS_COMPRESS_CUDA"] = "1"
    from ds_compress.ops import library
    from ds_compress.ops.schemas import SCHEMAS

    started = time.perf_counter()
    if not library.load():
        raise RuntimeError(f"the native library cannot be had: {library.failure()}")
    spent = time.perf_counter() - started
    key = device.type.upper()
    native = [
        op for op in SCHEMAS if torch._C._dispatch_has_kernel_for_dispatch_key(f"ds_compress::{op}", key)
    ]
    missing = sorted(set(SCHEMAS) - set(native))
    if missing:
        print(f"ops without a kernel for {key}: {missing}")
    return {"library": {"build and load s": spent, "ops": len(SCHEMAS), "ops without a kernel": len(missing)}}
