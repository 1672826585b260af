"""bf16, autocast, and fp16 with a loss scale that overflows and recovers, under every optimizer wrapper."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.gpu.runs import BLOCKS, assert_close, assert_density, cached, run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]

LAYOUTS = ("0", "1", "2", "2 overlap", "3", "3 overlap", "2 offload", "3 offload")


@pytest.mark.parametrize("layout", (*LAYOUTS, "1 fp32 sums", "2 round robin", "3 offload all"))
def test_bf16(layout: str) -> None:
    got = cached(layout, "everything", "bf16")
    assert_density(got, 0.5)
    # A loss near 0.7 is a multiple of 0.004.
    assert_close(got, cached("0", "everything"), 2e-2)
    assert got["applied"] == len(got["losses"])


@pytest.mark.parametrize("layout", ("0", "2", "3"))
def test_autocast(layout: str) -> None:
    got = cached(layout, "everything", "autocast")
    assert_density(got, 0.5)
    assert_close(got, cached("0", "everything"), 2e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp16_skips_what_overflows_and_goes_on(layout: str) -> None:
    got = run(layout, BLOCKS["everything"], "fp16", steps=14)
    assert got["applied"] == 14 - got["skipped"], got["scales"]
    if layout != "0":
        # Stage 0 without a fused optimizer does not multiply the loss by its scale.
        assert got["skipped"] >= 1 and len(set(got["scales"])) > 2, got["scales"]
    assert got["applied"] >= 4, got["scales"]
    assert_density(got, 0.5)
    assert got["losses"][-1] < got["losses"][0] + 0.05


@pytest.mark.parametrize("layout", ("0", "2", "3", "2 offload"))
def test_the_loss_scale_is_that_of_plain_deepspeed(layout: str) -> None:
    late = {**BLOCKS["sparse l1"]["sparse_pruning"]["shared_parameters"], "schedule_offset": 1000}  # type: ignore[index]
    block: dict[str, Any] = {
        "sparse_pruning": {**BLOCKS["sparse l1"]["sparse_pruning"], "shared_parameters": late}
    }  # type: ignore[index]
    got, plain = (run(layout, b, "fp16", steps=12, gradient_clipping=0.5) for b in (block, None))
    assert [got[k] for k in ("scales", "skipped", "losses")] == [
        plain[k] for k in ("scales", "skipped", "losses")
    ]


@functools.cache
def clipped(layout: str, dtype: str) -> dict[str, Any]:
    low = {"enabled": True, "initial_scale_power": 4}  # nothing overflows
    return run(layout, BLOCKS["sparse l1"], dtype, gradient_clipping=0.05, fp16=low)


@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
@pytest.mark.parametrize("layout", ("0", "1", "2", "3", "2 offload", "3 offload"))
def test_clipping_under_masks(layout: str, dtype: str) -> None:
    """Norms, of unscaled gradients that are applied, are those of fp32."""
    got, expected = clipped(layout, dtype), clipped("1", "fp32")
    assert got["skipped"] == 0
    assert_density(got, 0.3)
    assert got["norms"] == pytest.approx(expected["norms"], rel=0.1)
