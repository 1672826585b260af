"""Settings common to all tests: one thread, no model hub, no test that needs a GPU where there is none."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

# Before torch is imported: its thread pools read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The first example of a property pays for imports and allocations, so a deadline per example is noise here.
settings.register_profile("ds_compress", deadline=None, derandomize=True)
settings.load_profile("ds_compress")


@pytest.fixture(scope="module")
def single_process() -> None:
    """DeepSpeed in this process: `pytestmark = pytest.mark.usefixtures("single_process")`."""
    from tests.single import init_single_process

    init_single_process()


@pytest.fixture(autouse=True)
def no_autocast_of_an_earlier_test() -> Iterator[None]:
    """DeepSpeed keeps the settings of torch_autocast in its module: every later engine would scale its losses."""
    yield
    module = sys.modules.get("deepspeed.runtime.torch_autocast")
    if module is not None:
        module.TORCH_AUTOCAST_INITIALIZED, module.TORCH_AUTOCAST_DTYPE = False, None  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("DS_COMPRESS_GPU_TESTS_ON") == "cpu":
        return
    no_gpu = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What imports have left behind is no garbage. DeepSpeed collects it several times for every engine."""
    gc.collect()
    gc.freeze()
