"""DeepSpeed's own optimizers, compiled at first use: FusedAdam (and the wrapper that goes with it), and CPUAdam on
offloaded masters. Last of all, because their builds take a minute, in the background meanwhile."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.gpu.runs import BLOCKS, assert_close, assert_density, cached, run, structures
from tests.gpu.where import ON_CUDA
from tests.models import tiny_bert

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(170)]
PARAMETERS = {"lr": 1e-3} if ON_CUDA else {"lr": 1e-3, "torch_adam": True}
DEEPSPEED = {"optimizer": {"type": "AdamW", "params": PARAMETERS}, "zero_force_ds_cpu_optimizer": ON_CUDA}
BUILDERS = ("FusedAdamBuilder", "CPUAdamBuilder")


@pytest.fixture(scope="module")
def built() -> Any:
    """{builder: why it cannot be built, None when it can}"""
    if not ON_CUDA:
        return dict.fromkeys(BUILDERS)  # torch's AdamW stands in
    found = {}
    for builder in BUILDERS:
        code = f"from deepspeed.ops.op_builder import {builder} as B; B().load(verbose=False)"
        # Waits for the build in the background, or builds where there was none.
        try:
            made = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=90, text=True)
        except subprocess.TimeoutExpired:
            found[builder] = "not built in 90 s more"
            continue
        found[builder] = None if made.returncode == 0 else (made.stdout + made.stderr)[-1500:]
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["0", "1", "2", "2 overlap", "3", "2 offload", "3 offload"])
def test_trained_by_deepspeeds_adam(built: Any, layout: str, dtype: str) -> None:
    builder = "CPUAdamBuilder" if "offload" in layout else "FusedAdamBuilder"
    if built[builder]:
        pytest.skip(f"{builder}: {built[builder]}")
    steps = 14 if dtype == "fp16" else 8
    got = run(layout, BLOCKS["everything"], dtype, steps=steps, **DEEPSPEED)
    expected = ("DeepSpeedCPUAdam" if "offload" in layout else "FusedAdam") if ON_CUDA else "AdamW"
    assert got["optimizer"] == expected
    assert_density(got, 0.5)
    assert got["applied"] == steps - got["skipped"]
    if dtype != "fp16":
        assert_close(got, cached("0", "everything"), 5e-4 if dtype == "fp32" else 2e-2)
    elif layout != "0" or ON_CUDA:
        assert got["skipped"] >= 1 and len(set(got["scales"])) > 2, got["scales"]


@pytest.mark.parametrize("layout", ["0", "2", "3", "2 offload"])
def test_a_shrink_carries_their_moments(built: Any, layout: str) -> None:
    """The losses after it are those of the model that is only masked; Adam's bias correction goes on counting."""
    if built["CPUAdamBuilder" if "offload" in layout else "FusedAdamBuilder"]:
        pytest.skip("not built")
    losses = []
    for shrinks in (True, False):
        block = structures(method="l1", shrink_at_end_of_schedule=shrinks)
        losses.append(run(layout, block, model=lambda: tiny_bert(layers=4), **DEEPSPEED)["losses"])
    assert losses[0] == pytest.approx(losses[1], abs=5e-4)


@pytest.mark.parametrize("layout", ["0", "2", "3", "3 offload"])
def test_clipping_under_masks(built: Any, layout: str) -> None:
    """FP16_Optimizer clips in the middle of its step: there the limit is moved by a ratio of norms."""
    if built["CPUAdamBuilder" if "offload" in layout else "FusedAdamBuilder"]:
        pytest.skip("not built")
    got = run(layout, BLOCKS["sparse l1"], "bf16", gradient_clipping=0.05, **DEEPSPEED)
    expected = run("1", BLOCKS["sparse l1"], gradient_clipping=0.05)
    assert got["norms"][2:] == pytest.approx(expected["norms"][2:], rel=0.1)
    assert_close(got, expected, 2e-2)
