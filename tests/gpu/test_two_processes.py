"""Two processes that share the GPU over NCCL: the same run as in one, and reductions that travel quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.runs import assert_close, assert_same_zeros, cached
from tests.gpu.where import ON_CUDA
from tests.multirank.launch import run_ranks
from tests.multirank.test_reduction import check_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]
BACKEND = "nccl" if ON_CUDA else "gloo"
NAMES = [
    *((layout, "everything") for layout in ("0", "2 overlap", "3", "3 overlap", "2 offload", "3 offload")),
    *((layout, "structures") for layout in ("2", "3 offload")),
    *((layout, "sparse topk") for layout in ("3", "2 offload")),
    ("3", "sparse snip_momentum-4x1"),
]


@pytest.fixture(scope="module")
def two() -> Any:
    return run_ranks(2, "tests.gpu.runs:several", names=NAMES, backend=BACKEND, timeout_s=90)


@pytest.mark.parametrize(("layout", "name"), NAMES)
def test_two_processes_train_as_one(two: Any, layout: str, name: str) -> None:
    got, expected = two[0][layout, name], cached("0", name)
    assert_close(got, expected, 2e-4)
    if expected["targets"]:
        assert_same_zeros(got, expected)
    assert got["units"] == expected["units"]
    for key, weight in got["weights"].items():
        assert torch.equal(weight, two[1][layout, name]["weights"][key]), key


LAYOUTS = ["0 bf16", "1 bf16", "2 overlap", "2 offload", "3 bf16", "3 offload"]


@pytest.fixture(scope="module")
def reduced() -> Any:
    found = run_ranks(2, "tests.multirank.reduction:gradients", names=LAYOUTS, backend=BACKEND, timeout_s=90)
    return [{"gradients": rank} for rank in found]


@pytest.mark.parametrize("name", LAYOUTS)
def test_quantized_gradients_are_those_of_stock_deepspeed_within_the_scales(reduced: Any, name: str) -> None:
    check_gradients(reduced, name)
