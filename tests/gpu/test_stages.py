"""One answer on every ZeRO stage of a GPU: masks to the bit, losses, norms; with gradients in overlapping streams and
with optimizers on the CPU, whose masters are pinned copies there."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.gpu.runs import (
    BLOCKS,
    DENSITY,
    LAYOUTS,
    METHODS,
    assert_close,
    assert_density,
    assert_same_zeros,
    cached,
    run,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]
OTHERS = [layout for layout in LAYOUTS if layout not in ("0", "1 fp32 sums")]


@pytest.mark.parametrize("layout", OTHERS)
def test_pruned_and_quantized_alike(layout: str) -> None:
    got, expected = cached(layout, "everything"), cached("0", "everything")
    assert_same_zeros(got, expected)
    assert_density(got, 0.5)
    assert_close(got, expected, 2e-4)
    assert got["applied"] == expected["applied"] == len(got["losses"]) and got["skipped"] == 0


@pytest.mark.parametrize("layout", ["2", "3", "3 offload"])
@pytest.mark.parametrize("method", METHODS)
def test_masks_of_every_method(method: str, layout: str) -> None:
    got, expected = cached(layout, f"sparse {method}"), cached("0", f"sparse {method}")
    assert_same_zeros(got, expected)
    assert_density(got, 0.5 if ":" in method else DENSITY)
    assert_close(got, expected, 1e-4)


@pytest.mark.parametrize("layout", ["1", "2 overlap", "3", "2 offload", "3 offload"])
def test_units_of_structures(layout: str) -> None:
    got, expected = cached(layout, "structures"), cached("0", "structures")
    assert got["units"] and got["units"] == expected["units"]
    assert_close(got, expected, 1e-4)


@functools.cache
def clipped(layout: str) -> dict[str, Any]:
    return run(layout, BLOCKS["sparse taylor"], gradient_clipping=0.05)


@pytest.mark.parametrize("layout", ["0", "2", "2 overlap", "3", "2 offload", "3 offload"])
def test_clipping_counts_the_same_gradients(layout: str) -> None:
    got, expected = clipped(layout), clipped("1")
    if layout != "0":  # DeepSpeed's stage 0 in fp32 does not say its norm
        assert got["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    assert_close(got, expected, 1e-4)
    assert_same_zeros(got, expected)


def test_a_mask_that_is_not_due_changes_nothing() -> None:
    """The control: hooks alone leave every bit as plain DeepSpeed has it."""
    late: dict[str, Any] = {"schedule_offset": 1000}
    block = {**BLOCKS["sparse l1"]}
    shared = {**block["sparse_pruning"]["shared_parameters"], **late}
    block["sparse_pruning"] = {**block["sparse_pruning"], "shared_parameters": shared}
    for layout in ("0", "2 overlap", "3"):
        assert run(layout, block)["losses"] == cached(layout, "plain")["losses"], layout
