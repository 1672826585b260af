"""Settings common to all tests: one thread, no model hub, no test that needs a GPU where there is none."""

from __future__ import annotations

import os

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)
