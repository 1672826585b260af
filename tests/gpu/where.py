"""Where the tests of this folder train: on the CUDA device, or on the CPU to try the tests themselves.

    pytest -m gpu tests/gpu -n 4 --dist loadfile                # on a machine with a GPU, some minutes
    DS_COMPRESS_GPU_TESTS_ON=cpu pytest -m gpu tests/gpu        # the same functions, where there is none

Set it before Python starts: DeepSpeed asks for its accelerator once.
"""

from __future__ import annotations

import os

ON = os.environ.get("DS_COMPRESS_GPU_TESTS_ON", "cuda")
ON_CUDA = ON == "cuda"


def init_process_group() -> None:
    """A group of one process, over NCCL on a GPU; deterministic kernels, so that runs can be compared; idempotent."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if not ON_CUDA:
        os.environ["DS_ACCELERATOR"] = "cpu"
    from tests.single import group_of_one, init_single_process

    if not ON_CUDA:
        init_single_process()
        _allow_fp16()
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.cuda.set_device(0)
    make_deterministic()
    group_of_one("nccl")


def make_deterministic() -> None:
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def _allow_fp16() -> None:
    """DeepSpeed refuses fp16 on the CPU, where torch computes it, slowly."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
