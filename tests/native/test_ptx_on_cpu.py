"""Tier 4: the PTX that nvcc made of every kernel, on the CPU, gives the bits that the contract demands.

The source on the CPU (tier 3) replaces the inline assembly; here it runs as it is. The emulated tensor cores are
ours, so they are validated with PTX that Triton generated from a small int8 matrix product: its register layouts
ran on hardware. Five wrong layouts must then fail.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest

from tests.native.emulator import harness, nvcc
from tests.native.emulator.harness import Edit, Program
from tests.native.emulator.ptx_to_cpp import Untranslated, translate
from tests.native.linear_runs import CASES, LINEAR_SOURCES, check_linears, check_packing, check_quantization

needs_nvcc = pytest.mark.skipif(not nvcc.available(), reason="nvcc is not installed")
FIXTURES = harness.REPOSITORY / "tests/native/emulator/fixtures"
TRITON_DRIVER = "tests/native/emulator/fixtures/triton_int8_dot.cu"
TENSOR_CORE = "tests/native/emulator/tensor_core.h"


@pytest.fixture(scope="module")
def libraries() -> dict[str, harness.Library]:
    return harness.build_all([*LINEAR_SOURCES.values()], "ptx")


@needs_nvcc
@pytest.mark.parametrize("kind", list(CASES))
def test_the_ptx_of_the_linears_gives_the_bits_of_the_reference(
    kind: str, libraries: dict[str, harness.Library]
) -> None:
    check_linears(kind, CASES[kind], libraries, schedule=11)


@needs_nvcc
def test_the_ptx_of_the_quantization_gives_the_bits_of_the_reference(
    libraries: dict[str, harness.Library],
) -> None:
    check_quantization(libraries[LINEAR_SOURCES["quantize"]], schedule=5)


@needs_nvcc
def test_the_ptx_of_the_packing_gives_the_bits_of_the_reference(
    libraries: dict[str, harness.Library],
) -> None:
    check_packing(libraries[LINEAR_SOURCES["pack"]])


def test_an_unknown_opcode_or_modifier_is_an_error() -> None:
    head = ".version 9.0\n.target sm_80\n.visible .entry k()\n{\n.reg .b32 %r<3>;\n"
    with pytest.raises(Untranslated, match="unknown opcode"):
        translate(head + "vadd.u32.u32.u32 %r1, %r2, %r2;\nret;\n}")
    with pytest.raises(Untranslated, match="unknown modifiers"):
        translate(head + "add.sat.s32 %r1, %r2, %r2;\nret;\n}")


# --- PTX that we did not write -------------------------------------------------------------------------------


@functools.cache
def triton_ptx() -> str:
    return (FIXTURES / "triton_int8_dot.ptx.txt").read_text()


TRITON_SHAPES = [(64, 64, 64), (70, 130, 208), (128, 33, 16)]


def triton_mismatches(edits: tuple[Edit, ...] = ()) -> int:
    """How many elements of Triton's products are wrong on the emulator, after `edits` of its tensor cores."""
    library = harness.build(TRITON_DRIVER, "ptx", edits, triton_ptx())
    random = np.random.default_rng(3)
    programs, wanted = [], []
    for m, n, k in TRITON_SHAPES:
        a, b = (random.integers(-128, 128, (rows, k), dtype=np.int8) for rows in (m, n))
        wanted.append(a.astype(np.int32) @ b.astype(np.int32).T)
        buffers = {"a": a, "b": b, "c": np.full((m, n), 7, np.int32)}
        programs.append(Program(buffers, [("dsc_triton_int8_dot", ("a", "b", "c", m, n, k, None))], ("c",)))
    results = harness.run(library, programs, schedule=2).results
    return sum(int((result["c"] != right).sum()) for result, right in zip(results, wanted, strict=True))


def test_ptx_that_triton_generated_runs_without_a_mismatch() -> None:
    assert triton_mismatches() == 0


WRONG_LAYOUTS: dict[str, Edit] = {
    "operand a: the rows g and g + 8 swapped": Edit(
        TENSOR_CORE, "put_word(&a[group + i % 2 * 8][k + i / 2 * 16], mine->a[i]);",
        "put_word(&a[group + (i + 1) % 2 * 8][k + i / 2 * 16], mine->a[i]);"),
    "operand a: the halves of k before the rows": Edit(
        TENSOR_CORE, "put_word(&a[group + i % 2 * 8][k + i / 2 * 16], mine->a[i]);",
        "put_word(&a[group + i / 2 * 8][k + i % 2 * 16], mine->a[i]);"),
    "operand b: its column in the lane's low bits": Edit(
        TENSOR_CORE, "for (int i = 0; i < 2; i++) put_word(&b[group][k + i * 16], mine->b[i]);",
        "for (int i = 0; i < 2; i++) put_word(&b[lane % 8][lane / 8 * 4 + i * 16], mine->b[i]);"),
    "sums: row-major pairs taken for column-major": Edit(
        TENSOR_CORE, "a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];",
        "a[lane / 4 + i % 2 * 8], *column = b[lane % 4 * 2 + i / 2];"),
    "ldmatrix: the rows of a matrix handed out by lane % 8": Edit(
        TENSOR_CORE, "static_cast<MatrixRows*>(slots[matrix * 8 + lane / 4]);",
        "static_cast<MatrixRows*>(slots[matrix * 8 + lane % 8]);"),
}  # fmt: skip


def test_wrong_layouts_are_seen() -> None:
    jobs: list[Callable[[], object]] = [
        functools.partial(triton_mismatches, (e,)) for e in WRONG_LAYOUTS.values()
    ]
    outcomes = dict(zip(WRONG_LAYOUTS, harness.in_parallel(jobs), strict=True))
    elements = sum(m * n for m, n, _ in TRITON_SHAPES)
    assert all(isinstance(wrong, int) and wrong > elements // 3 for wrong in outcomes.values()), outcomes
