"""One process group for all tests of this folder, and DeepSpeed's optimizer builds, begun at once in the background."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.frozen import freeze_imports
from tests.gpu.where import ON_CUDA, init_process_group

_BUILDERS = ("FusedAdamBuilder", "CPUAdamBuilder")
_builds: list[subprocess.Popen[bytes]] = []


def pytest_configure(config: pytest.Config) -> None:
    import torch

    # DeepSpeed's builders read a list of numbers, without the letter of a feature set (9.0a).
    numbers = re.sub(r"(\d)[af]\b", r"\1", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if numbers:
        os.environ["TORCH_CUDA_ARCH_LIST"] = numbers

    asked = any(not arg.partition("::")[0].endswith(".py") or "test_z_" in arg for arg in config.args)
    if asked and ON_CUDA and torch.cuda.is_available() and not hasattr(config, "workerinput"):
        for builder in _BUILDERS:
            code = f"from deepspeed.ops.op_builder import {builder} as B; B().load(verbose=False)"
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            _builds.append(subprocess.Popen([sys.executable, "-c", code], **quiet))


def pytest_unconfigure(config: pytest.Config) -> None:
    for build in _builds:
        build.kill()


@pytest.fixture(scope="session", autouse=True)
def process_group() -> None:
    init_process_group()
    freeze_imports()


@pytest.fixture(autouse=True)
def nothing_left_on_the_device() -> Iterator[None]:
    """What an earlier test has left behind is not in the memory figures of the next; what it leaks costs no time."""
    yield
    import gc

    import torch

    gc.collect()
    gc.freeze()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
