"""Runs the linears' cases on the emulator, whatever the mode of the libraries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from tests.native import linear_cases as cases
from tests.native.emulator import harness
from tests.native.emulator.harness import Program
from tests.native.linear_cases import LinearCase

LINEAR_SOURCES = {name: f"csrc/cuda/linear/{name}.cu" for name in ("quantize", "pack")} | cases.SOURCES
CASES = {"int8": cases.INT8_CASES, "int4": cases.INT4_CASES}
Libraries = dict[str, harness.Library]


def check_linears(kind: str, chosen: Sequence[LinearCase], libraries: Libraries, schedule: int) -> None:
    """Packs the weights on the emulator, multiplies, and compares with the contract; conflicts would show too."""
    inputs = [cases.make_inputs(case) for case in chosen]
    pack = [cases.pack_program(case, each) for case, each in zip(chosen, inputs, strict=True)]
    packed = harness.run(libraries[LINEAR_SOURCES["pack"]], pack, schedule).results
    programs = [
        cases.linear_program(case, each, result["packed"])
        for case, each, result in zip(chosen, inputs, packed, strict=True)
    ]
    outcome = harness.run(libraries[LINEAR_SOURCES[kind]], programs, schedule)
    for case, each, result in zip(chosen, inputs, outcome.results, strict=True):
        cases.check(case, each, cases.as_output(case, result["out"]))
    check_fused(kind, chosen, packed, libraries, schedule)
    assert outcome.statistics.ldmatrix_phases > 0
    assert outcome.statistics.bank_conflicts == 0


def check_fused(
    kind: str,
    chosen: Sequence[LinearCase],
    packed: Sequence[dict[str, np.ndarray]],
    libraries: Libraries,
    schedule: int,
) -> None:
    """The launch that quantizes x itself, where there is one."""
    both = [
        (case, each["packed"])
        for case, each in zip(chosen, packed, strict=True)
        if cases.quantizes_itself(case)
    ]
    programs = [cases.fused_program(case, cases.make_inputs(case), weight) for case, weight in both]
    if not programs:
        return
    results = harness.run(libraries[LINEAR_SOURCES[kind]], programs, schedule).results
    for (case, _), result in zip(both, results, strict=True):
        cases.check(case, cases.make_inputs(case), cases.as_output(case, result["out"]))


def quantization_cases() -> list[tuple[torch.Tensor, int, torch.Tensor | None]]:
    """x, steps, given scale: both kernels (short and long rows), all dtypes, tails, values of every kind."""
    chosen = []
    generator = torch.Generator().manual_seed(8)
    for rows, columns in ((1, 1), (9, 16), (17, 63), (8, 300), (2, 2047), (3, 2064), (2, 2500), (5, 0)):
        for dtype in cases.DTYPES:
            x = (
                torch.randn(rows, columns, generator=generator)
                * torch.rand(rows, 1, generator=generator)
                * 10
            )
            chosen.append((x.to(dtype), 127 + rows % 2, None))
    special = torch.randn(8, 37, generator=generator)
    special[0, 3], special[1, 36], special[2, 0] = math.nan, math.inf, -math.inf
    special[3], special[4], special[5] = 0.0, 1e-40, 2.0**-130
    special[6] = torch.arange(37) * 0.5 - 9.25  # ties of the given scale
    special[7, 5] = 3.4e38
    long = torch.zeros(2, 2500)
    long[0, 2499], long[1, 2100] = math.nan, -5.0
    for x in (special, long):
        for given in (None, torch.tensor([0.5]), torch.tensor([2.0**-126])):
            chosen += [(x, steps, given) for steps in (127, 128)]
    return chosen


def check_quantization(library: harness.Library, schedule: int) -> None:
    chosen = quantization_cases()
    results = harness.run(library, [cases.quantize_program(*each) for each in chosen], schedule).results
    for (x, steps, given), result in zip(chosen, results, strict=True):
        codes, scale = cases.expected_quantization(x, steps, given)
        padded = torch.nn.functional.pad(codes, (0, -x.shape[1] % 16))
        what = f"{tuple(x.shape)} {x.dtype} steps {steps} given {given}"
        np.testing.assert_array_equal(result["scales"], scale.numpy(), err_msg=what)
        np.testing.assert_array_equal(result["codes"], padded.numpy(), err_msg=what)


def check_packing(library: harness.Library) -> None:
    """Headers, int8 bodies, and quantize-and-pack in one pass."""
    case = LinearCase(1, 21, 50)
    inputs = cases.make_inputs(case)
    packed = harness.run(library, [cases.pack_program(case, inputs)]).results[0]["packed"]
    assert packed[:64].view(np.int64).tolist() == [
        int.from_bytes(b"DSCPACK1", "little"),
        16,
        21,
        50,
        0,
        0,
        0,
        0,
    ]
    body = packed[64:].view(np.int8).reshape(21, 64)
    np.testing.assert_array_equal(body[:, :50], inputs.codes.numpy())
    assert not body[:, 50:].any()
    for steps in (127, 128):
        check_quantize_pack(library, steps)


def check_quantize_pack(library: harness.Library, steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    shapes = [(torch.float32, 33, False), (torch.bfloat16, 48, True), (torch.float16, 5, False)]
    for dtype, columns, one_scale in shapes:
        weight = torch.randn(7, columns, generator=generator).to(dtype)
        scale = torch.full((1,), 0.01) if one_scale else weight.float().abs().amax(1) / 150
        if not one_scale:
            scale[3] = math.nan
        wanted = (
            torch.round(weight.float() / scale[:, None]).clamp(-steps, 127).nan_to_num(0.0).to(torch.int8)
        )
        pitch = -(-columns // 16) * 16
        buffers = {
            "w": cases.raw(weight),
            "scale": cases.raw(scale),
            "packed": np.full(64 + 7 * pitch, 9, np.uint8),
        }
        arguments = ("w", cases.DTYPES[dtype], "scale", int(one_scale), 7, columns, steps, "packed", None)
        program = Program(buffers, [("dsc_int8_quantize_pack", arguments)], ("packed",))
        body = harness.run(library, [program]).results[0]["packed"][64:].view(np.int8).reshape(7, pitch)
        np.testing.assert_array_equal(body[:, :columns], wanted.numpy())
        assert not body[:, columns:].any()
