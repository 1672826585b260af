"""The emulator itself: the rules that it enforces, its 16-bit floats, its portable fibers."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from tests.native.emulator import harness
from tests.native.emulator.harness import Edit, Fault, Program
from tests.native.linear_runs import LINEAR_SOURCES, check_quantization

RULES = "tests/native/emulator/fixtures/rules.cu"
GARBAGE = np.frombuffer(b"\xcd" * 4, np.int32)[0]


@functools.cache
def rules() -> harness.Library:
    return harness.build(RULES, "plain")


def run_rules(broken: int, schedule: int) -> np.ndarray:
    buffers = {"in": np.arange(8, dtype=np.int32), "out": np.zeros(64, np.int32)}
    program = Program(buffers, [("dsc_rules", (broken, "in", "out", None))], ("out",))
    return harness.run(rules(), [program], schedule).results[0]["out"]


@pytest.mark.parametrize("schedule", [0, -1, 5])
@pytest.mark.parametrize(
    ("broken", "report"),
    [
        (1, "deadlock: a warp collective is not reached"),
        (2, "not in the mask"),
        (3, "overlapping masks|not reached by every lane"),
        (4, "reads a lane outside its mask"),
        (5, "meet at different collectives"),
        (6, "not 16-byte aligned"),
        (7, "more shared memory"),
    ],
)
def test_a_broken_rule_is_reported_with_the_thread(broken: int, report: str, schedule: int) -> None:
    with pytest.raises(Fault, match=rf"emulator: .*({report}).*at block \(0, 0, 0\) thread"):
        run_rules(broken, schedule)


def test_shared_memory_begins_as_garbage() -> None:
    assert (run_rules(0, 0) == GARBAGE).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_floats_convert_as_torch_s(dtype: torch.dtype) -> None:
    """Every pattern, and floats around every boundary: ties, subnormals, overflow, NaN."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    exact = patterns.view(dtype).float()
    near = [exact, *(exact.nextafter(torch.tensor(way)) for way in (-torch.inf, torch.inf))]
    middles = (exact[:-1].double() + exact[1:].double()).div(2).float()
    values = torch.cat([*near, middles, torch.randn(5000) * 1e-6, torch.tensor([1e-45, -1e-45, 3.4e38])])
    buffers = {
        "patterns": patterns.numpy(),
        "read": np.zeros(65536, np.float32),
        "values": values.numpy(),
        "rounded": np.zeros(len(values), np.int16),
    }
    arguments = (int(dtype == torch.float16), "patterns", "read", "values", "rounded", len(values), None)
    program = Program(buffers, [("dsc_conversions", arguments)], ("read", "rounded"))
    result = harness.run(rules(), [program]).results[0]
    read, number = torch.from_numpy(result["read"].copy()), ~exact.isnan()
    assert torch.equal(read.view(torch.int32)[number], exact.view(torch.int32)[number])
    assert read[~number].isnan().all()
    wanted = values.to(dtype)
    mine = torch.from_numpy(result["rounded"].copy()).view(dtype)
    assert torch.equal(mine.isnan(), wanted.isnan())
    assert torch.equal(mine.view(torch.int16)[~wanted.isnan()], wanted.view(torch.int16)[~wanted.isnan()])


def test_portable_fibers_give_the_same() -> None:
    """ucontext, for processors whose registers we do not switch by hand."""
    portable = Edit(
        "tests/native/emulator/fiber.h", "#if !defined(__x86_64__) && !defined(DSC_UCONTEXT)", "#if 1"
    )
    check_quantization(harness.build(LINEAR_SOURCES["quantize"], "plain", [portable]), schedule=2)


def test_an_edit_that_does_not_apply_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 times"):
        harness.build(RULES, "plain", [Edit(RULES, "no such text", "")])
