"""What running DeepSpeed on a machine without an accelerator takes."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def skip_shared_memory_build() -> None:
    """Keeps DeepSpeed from compiling its shared-memory collectives; call it before `deepspeed.initialize`.

    On CPU every first job of several processes builds that C++ op, which takes two minutes and more; without
    it the collectives go through gloo. Nothing but a private table switches it off.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def keep_freed_memory() -> None:
    """Keeps glibc from handing large blocks back to the kernel at every free; elsewhere it does nothing.

    A training step frees and allocates the same hundreds of megabytes again and again. By default each of
    them is unmapped and faulted in anew, page by page: a third of the time of a small model's step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
