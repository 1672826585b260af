"""The same runs on the CPU, where the package is developed: a process without a GPU beside this one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.runs import BLOCKS, assert_close, assert_same_zeros, cached
from tests.multirank.launch import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]
NAMES = [("0", name) for name in BLOCKS]
ON_THE_EDGE = 0.005
"""Share of weights whose rank two devices may see differently: sums in another order, near a threshold."""


@pytest.fixture(scope="module")
def on_cpu() -> Any:
    return run_ranks(1, "tests.gpu.runs:several", names=NAMES, backend="gloo")[0]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("layout", ["0", "3 offload"])
def test_as_on_the_cpu(on_cpu: Any, layout: str, name: str) -> None:
    got, expected = cached(layout, name), on_cpu["0", name]
    # A code or a unit that falls to the other side moves a loss more than rounding does.
    assert_close(got, expected, 1e-4 if name == "plain" else 3e-3)
    if expected.get("targets"):
        assert_same_zeros(got, expected, ON_THE_EDGE)
    if name in ("sparse l1", "sparse random", "sparse l1-2:4"):
        assert_same_zeros(got, expected)  # made of the first weights, which are the same bits
    for key, weight in expected["weights"].items():
        if weight.dim() > 1:  # biases of keys have gradients of rounding errors alone
            assert float((got["weights"][key] - weight).norm()) <= 0.15 * float(weight.norm()), key
