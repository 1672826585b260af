"""The CUDA linears of many experts without a GPU: their source and their PTX on the CPU, and planted bugs.

No GPU has run them yet; `-m gpu` has their cases (test_cuda_device.py, test_cuda_products.py).
"""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest

from tests.native import grouped_cases
from tests.native.emulator import harness, nvcc
from tests.native.emulator.harness import Edit, Fault, Library, Program
from tests.native.grouped_cases import CASES, SOURCE, GroupedCase, check_products, check_quantization
from tests.native.linear_runs import LINEAR_SOURCES

RUNS = [("plain", 0), ("plain", -1), ("plain", 7), ("asan", 3), ("tsan", 4)]
KINDS = ("int8", "int4")


@functools.cache
def library(mode: str, source: str = SOURCE) -> Library:
    return harness.build(source, mode)


def of_kind(kind: str) -> list[GroupedCase]:
    return [case for case in CASES if case.kind == kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "schedule"), RUNS)
def test_products_give_the_bits_of_each_expert_alone(kind: str, mode: str, schedule: int) -> None:
    check_products(of_kind(kind), library("plain", LINEAR_SOURCES["pack"]), library(mode), schedule)


@pytest.mark.parametrize(("mode", "schedule"), RUNS)
def test_rows_are_quantized_in_the_range_of_their_expert(mode: str, schedule: int) -> None:
    check_quantization(library(mode), schedule)


@pytest.mark.skipif(not nvcc.available(), reason="nvcc is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_the_ptx_gives_the_bits_of_each_expert_alone(kind: str) -> None:
    check_products(of_kind(kind), library("plain", LINEAR_SOURCES["pack"]), library("ptx"), schedule=11)
    if kind == "int8":
        check_quantization(library("ptx"), schedule=5)


@pytest.mark.parametrize("offsets", [(5, 2, 9), (-3, 400, 1), (2**31 - 1, -(2**31), 0)], ids=str)
@pytest.mark.parametrize("mode", ["plain", "asan"])
def test_wrong_offsets_reach_nothing_beyond_the_rows(offsets: tuple[int, ...], mode: str) -> None:
    """They give nonsense, and no fault: nobody can look at them before the launch."""
    case = GroupedCase((3, 4, 2), 17, 70, static=True)
    inputs = grouped_cases.make_inputs(case)
    packed = grouped_cases.packed_weights(case, inputs, library("plain", LINEAR_SOURCES["pack"]))
    for program in (
        grouped_cases.linear_program(case, inputs, packed),
        grouped_cases.quantize_program(case, inputs),
    ):
        wrong = Program(
            {**program.buffers, "offsets": np.array(offsets, np.int32)}, program.calls, program.outputs
        )
        harness.run(library(mode), [wrong], 2)


@pytest.mark.parametrize(
    ("place", "value"), [(3, 24), (8, 0)], ids=["weights that are not aligned", "no experts"]
)
def test_arguments_that_no_kernel_serves_are_refused(place: int, value: int) -> None:
    case = GroupedCase((3, 4), 17, 70)
    inputs = grouped_cases.make_inputs(case)
    packed = grouped_cases.packed_weights(case, inputs, library("plain", LINEAR_SOURCES["pack"]))
    program = grouped_cases.linear_program(case, inputs, packed)
    [(function, arguments)] = program.calls
    changed = (*arguments[:place], value, *arguments[place + 1 :])
    with pytest.raises(Fault, match=f"{function} returned 1"):
        harness.run(library("plain"), [Program(program.buffers, [(function, changed)], program.outputs)])


GEMM, EXPERTS = "csrc/cuda/linear/grouped_gemm.cuh", "csrc/cuda/linear/experts.cuh"
_GIVEN = "given_scales + (expert < experts.count ? expert : experts.count - 1)"
_ZEROS = "store(e, (rows.first + i / tile_n) * e.n + first_n + i % tile_n, zero, 1);"
_BEGIN = "begin = experts.end(expert - 1), end = experts.end(expert), nth"
MUTANTS: dict[str, tuple[str, Edit]] = {
    "the weights of the expert before": (
        "plain",
        Edit(GEMM, "packed + expert * bytes", "packed + (expert > 0 ? expert - 1 : 0) * bytes"),
    ),
    "the weight scales of the first expert": (
        "plain",
        Edit(GEMM, "own.weight_scale += rows.expert * e.n;", "own.weight_scale += 0;"),
    ),
    "the bias of the first expert": (
        "plain",
        Edit(GEMM, "own.bias += rows.expert * e.n;", "own.bias += 0;"),
    ),
    "a tile goes on into the rows of the next expert": (
        "tsan",
        Edit(GEMM, "own.m = rows.end;", "own.m = e.m;"),
    ),
    "every row begins a tile": ("tsan", Edit(EXPERTS, "nth % tile != 0", "nth % tile == tile")),
    "an expert has one tile": ("plain", Edit(EXPERTS, "nth % tile != 0", "nth != 0")),
    "the rows of an expert begin with its second": (
        "plain",
        Edit(EXPERTS, _BEGIN, _BEGIN.replace("1),", "1) + 1,")),
    ),
    "two experts share a place": (
        "plain",
        Edit(EXPERTS, "begin : begin / tile + expert", "begin : begin / tile + 0 * expert"),
    ),
    "the grid has no room for the last expert": (
        "plain",
        Edit(EXPERTS, "rows / tile + experts + 1", "rows / tile + experts - 1"),
    ),
    "offsets of 32 bits are read as 64": ("asan", Edit(EXPERTS, "given = wide ?", "given = true ?")),
    "wrong offsets are not clamped": ("asan", Edit(EXPERTS, "given < rows ? given : rows", "given")),
    "rows of no expert are left as they were": ("plain", Edit(GEMM, _ZEROS, "static_cast<void>(zero);")),
    "the scale of the first expert for all rows": (
        "quantize",
        Edit(GEMM, _GIVEN, "given_scales + 0 * expert"),
    ),
}


def evidence(name: str) -> str:
    mode, edit = MUTANTS[name]
    mutated = harness.build(SOURCE, "plain" if mode == "quantize" else mode, (edit,))
    try:
        if mode == "quantize":
            check_quantization(mutated, 1)
        elif "not clamped" in name:
            wrong_offsets(mutated)
        else:
            check_products(of_kind("int8"), library("plain", LINEAR_SOURCES["pack"]), mutated, 1)
    except (AssertionError, Fault) as report:
        return str(report)
    return ""


def wrong_offsets(mutated: Library) -> None:
    case = GroupedCase((3, 4, 2), 17, 70)
    inputs = grouped_cases.make_inputs(case)
    packed = grouped_cases.packed_weights(case, inputs, library("plain", LINEAR_SOURCES["pack"]))
    program = grouped_cases.linear_program(case, inputs, packed)
    beyond = {**program.buffers, "offsets": np.array([3, 7, 400], np.int32)}
    harness.run(mutated, [Program(beyond, program.calls, program.outputs)], 0)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_seen(name: str) -> None:
    report = evidence(name)
    seen = {"asan": "heap-buffer-overflow", "tsan": "data race"}.get(MUTANTS[name][0], "differ|NaN elsewhere")
    assert re.search(seen, report), report
