"""DeepSpeed in this very process, world size 1, for unit tests of the engine seam."""

from __future__ import annotations

import atexit
import os

import deepspeed
import deepspeed.ops
import torch.distributed as dist


def init_single_process() -> None:
    """A gloo group of one; idempotent."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized():
        return
    group_of_one("gloo")
    # A gloo thread that outlives the interpreter aborts it.
    atexit.register(dist.destroy_process_group)


def group_of_one(backend: str) -> None:
    """This process alone on `backend`, in DeepSpeed, too.

    It meets itself in memory: a port found free may be taken before it is listened on.
    """
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(backend)
