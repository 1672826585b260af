"""DeepSpeed in this very process, world size 1, for unit tests of the engine seam."""

from __future__ import annotations

import atexit
import os
import socket

import deepspeed
import deepspeed.ops
import torch.distributed as dist


def init_single_process() -> None:
    """A gloo group of one; idempotent."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized():
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    deepspeed.init_distributed("gloo")
    # A gloo thread that outlives the interpreter aborts it.
    atexit.register(dist.destroy_process_group)
