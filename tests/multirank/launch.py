"""Runs a function in several gloo processes and returns what each of them returned.

A launch costs a second, so one launch runs a whole list of scenarios and tests look at the results.

With DS_COMPRESS_TEST_BACKEND=nccl in the environment the processes train on CUDA devices over NCCL. They share the
devices that there are: one is enough, because NCCL takes processes with different NCCL_HOSTID for those of different
hosts, which may have the same device.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.fork_server import ForkedProcess, fork_server

Process = subprocess.Popen[bytes] | ForkedProcess
BACKEND = os.environ.get("DS_COMPRESS_TEST_BACKEND", "gloo")
_REPOSITORY = Path(__file__).resolve().parents[2]


def run_ranks(
    world_size: int, function: str, timeout_s: float = 540, backend: str = BACKEND, **arguments: Any
) -> list[Any]:
    """Calls `function` ("package.module:name") with `arguments` in `world_size` processes, on `backend`.

    Returns the results by rank. A failing or hanging process fails the test with its output.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, f"{folder}/arguments.pt")
        processes = []
        for rank in range(world_size):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "0",  # DeepSpeed asks for one; the ranks meet in a file instead (`_main`)
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "DS_COMPRESS_TEST_BACKEND": backend,
                **(
                    _on_cuda(rank, torch.cuda.device_count())
                    if backend == "nccl"
                    else {"DS_ACCELERATOR": "cpu"}
                ),
            }
            arguments_of_python = ["-m", "tests.multirank.launch", function, folder]
            processes.append(_start(rank, arguments_of_python, Path(f"{folder}/{rank}.log"), environment))
        failed = _wait(processes, timeout_s)
        if failed is not None:
            said = Path(f"{folder}/{failed}.log").read_text()[-6000:]
            raise AssertionError(f"rank {failed} of {function} failed or hung:\n{said}")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]


def _on_cuda(rank: int, devices: int) -> dict[str, str]:
    return {
        "DS_ACCELERATOR": "cuda",
        "LOCAL_RANK": str(rank % devices),
        "NCCL_HOSTID": f"rank{rank}",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic matrix products ask for
    }


def _start(rank: int, arguments: list[str], output: Path, environment: dict[str, str]) -> Process:
    if environment["DS_ACCELERATOR"] == "cpu":
        # The neighbours of a rank come from another server: an order that depends on hashes would show.
        server = fork_server(rank % 2, "deepspeed.ops", "tests.frozen:freeze_imports")
        return server.start(arguments, output, environment)
    command = [sys.executable, *arguments]
    with open(output, "w") as log:
        return subprocess.Popen(
            command, cwd=_REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def _wait(processes: list[Process], timeout_s: float) -> int | None:
    """The rank that failed first (or still ran at the deadline), or None; kills the others."""
    deadline = time.monotonic() + timeout_s
    failed = None
    while failed is None and any(p.poll() is None for p in processes):
        failed = next((rank for rank, p in enumerate(processes) if p.poll() not in (None, 0)), None)
        if failed is None and time.monotonic() > deadline:
            failed = next(rank for rank, p in enumerate(processes) if p.poll() is None)
        time.sleep(0.05)
    failed = (
        failed if failed is not None else next((r for r, p in enumerate(processes) if p.returncode), None)
    )
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    return failed


def _main() -> None:
    function, folder = sys.argv[1:]
    import torch

    torch.set_num_threads(1)
    import deepspeed
    import deepspeed.ops

    from tests.ending import end
    from tests.frozen import freeze_imports

    # Its C++ build takes minutes and changes nothing here: gloo carries the collectives.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if BACKEND == "nccl":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    deepspeed.init_distributed(
        BACKEND,
        # A port found free may be taken before rank 0 listens on it, with thousands of launches beside each other.
        init_method=f"file://{folder}/ranks_meet_here",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    module, _, name = function.partition(":")
    function_to_run = getattr(importlib.import_module(module), name)
    freeze_imports()
    arguments = torch.load(f"{folder}/arguments.pt", weights_only=False)
    result = function_to_run(**arguments)
    torch.save(result, f"{folder}/{os.environ['RANK']}.pt")
    end()


if __name__ == "__main__":
    _main()
