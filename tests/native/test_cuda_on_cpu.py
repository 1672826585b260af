"""Tier 3: the source of every CUDA linear on the CPU, one fiber per CUDA thread.

The same cases run plainly under several schedules, under ASan and UBSan, and under TSan, where each CUDA thread is
a thread of its own. What each finds is shown by the planted bugs of test_detectors.py.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from ds_compress.ops.reference import linear as reference
from ds_compress.ops.sizes import packed_bytes
from tests.native.emulator import harness
from tests.native.emulator.harness import Library, Program
from tests.native.linear_cases import HEADER_BYTES, LinearCase, check, make_inputs, packed_numel
from tests.native.linear_runs import CASES, LINEAR_SOURCES, check_linears, check_packing, check_quantization

# Mode and schedule: 0 in order, -1 in reverse, else the seed of a shuffle.
RUNS = [("plain", 0), ("plain", -1), ("plain", 7), ("asan", 3), ("tsan", 4)]


@functools.cache
def libraries(mode: str) -> dict[str, Library]:
    return harness.build_all([*LINEAR_SOURCES.values()], mode)


@pytest.mark.parametrize("kind", list(CASES))
@pytest.mark.parametrize(("mode", "schedule"), RUNS)
def test_linears_give_the_bits_of_the_contract(kind: str, mode: str, schedule: int) -> None:
    check_linears(kind, CASES[kind], libraries(mode), schedule)


@pytest.mark.parametrize(("mode", "schedule"), RUNS)
def test_row_quantization_gives_the_bits_of_the_contract(mode: str, schedule: int) -> None:
    check_quantization(libraries(mode)[LINEAR_SOURCES["quantize"]], schedule)


@pytest.mark.parametrize("case", [case for kind in CASES.values() for case in kind], ids=str)
def test_the_expected_values_are_those_of_the_reference_op(case: LinearCase) -> None:
    """The cases state the contract once more, on their own: both statements give the same."""
    inputs = make_inputs(case)
    options = {"steps": case.steps, "activation": case.activation, "out_dtype": case.out_dtype}
    rest = (inputs.bias, inputs.input_scale)
    if case.kind == "int4":
        packed = reference.int4_linear_pack(inputs.codes, inputs.weight_scale)
        out = reference.int4_linear(inputs.x, packed, case.n, case.group, *rest, **options)
    else:
        packed = reference.int8_linear_pack(inputs.codes)
        out = reference.int8_linear(inputs.x, packed, inputs.weight_scale, *rest, **options)
    check(case, inputs, out)


@pytest.mark.parametrize("mode", ["plain", "asan"])
def test_packing(mode: str) -> None:
    check_packing(libraries(mode)[LINEAR_SOURCES["pack"]])


@pytest.mark.parametrize(
    "call",
    [
        ("quantize", "dsc_quantize_rows", ("x", 3, None, 1, 1, 127, "x", "x", None)),  # no such dtype
        ("quantize", "dsc_quantize_rows", ("x", 0, None, 1, 1, 100, "x", "x", None)),  # no such steps
        ("pack", "dsc_int4_pack", ("x", "x", 1, 48, 48, "x", None)),  # no such group
        ("int4", "dsc_int4_linear", ("x", "x", "x", None, "x", 0, 0, 1, 1, 48, 48, None)),
    ],
    ids=lambda call: "-".join(str(a) for a in (call[1], *call[2])),
)
def test_arguments_that_no_kernel_serves_are_refused(
    call: tuple[str, str, tuple[str | int | None, ...]],
) -> None:
    source, function, arguments = call
    library = libraries("plain")[LINEAR_SOURCES[source]]
    with pytest.raises(harness.Fault, match=f"{function} returned 1"):
        harness.run(library, [Program({"x": np.zeros(4096, np.uint8)}, [(function, arguments)], ())])


def test_packed_weights_fit_into_the_bytes_that_tracers_are_told() -> None:
    for n in (1, 7, 8, 9, 16, 17, 48, 49, 130):
        for k in (0, 1, 4, 15, 16, 17, 32, 33, 64, 65, 128, 1000):
            assert packed_numel(LinearCase(1, n, k)) <= packed_bytes(n, k)
            for group in (32, 64, 128):
                case = LinearCase(1, n, k, "int4", group)
                assert packed_numel(case) <= packed_bytes(n, k, bits=4, groups=-(-k // group))
    assert packed_numel(LinearCase(1, 0, 5)) == HEADER_BYTES
