"""Planted bugs in the elementwise kernels are caught by the tests of test_elementwise_cuda."""

from __future__ import annotations

import functools

from tests.native.emulator import harness
from tests.native.emulator.harness import Edit
from tests.native.test_elementwise_cuda import CASES, FOLDER, check

DEVICE = "csrc/include/ds_compress/device.h"
FORMAT = "csrc/include/ds_compress/float_format.h"


def edit_of(name: str, old: str, new: str) -> Edit:
    return Edit(f"{FOLDER}/{name}.cuh", old, new)


BUGS = {
    # what is wrong: (source, mode, the edit)
    "the byte after the mask is read": (
        "mask", "asan", edit_of("mask", "straddles = shift + width > 8;", "straddles = true;"),
    ),
    "a vector is read beyond the end": (
        "mask", "asan", edit_of("mask", "(count - head) / width,", "(count - head + width - 1) / width,"),
    ),
    "a tail is not masked": (
        "mask", "plain", edit_of("mask", "if (i >= tensor.head + tensor.tail)", "if (i >= tensor.head)"),
    ),
    "many tensors: a tile counts from the first tensor": (
        "mask", "plain", edit_of("mask", "tile : tile - tensors.tiles[which - 1];", "tile : tile;"),
    ),
    "many tensors: the first tile of each goes to the one before": (
        "mask", "plain", edit_of("mask", "if (tile >= tensors.tiles[which", "if (tile > tensors.tiles[which"),
    ),
    "ties go to the higher index": (
        "mask", "plain", edit_of("select", "k < element ? other >= mine", "k > element ? other >= mine"),
    ),
    "ties go to the higher index, in registers": (
        "mask", "plain", edit_of("select", "rank += k < j ? keys", "rank += k > j ? keys"),
    ),
    "prmt: its operands swapped": (
        "mask", "ptx", Edit(DEVICE, "prmt.b32 %0, %1, 0, %2;", "prmt.b32 %0, 0, %1, %2;"),
    ),
    "partial spans are read before they are written": (
        "fake_quantize", "tsan", edit_of("span", "        __syncthreads();\n", ""),
    ),
    "two blocks write a span without atomics": (
        "fake_quantize", "tsan",
        edit_of("fake_quantize", "atomicMax(reinterpret_cast<unsigned*>(scale) + row, math::bits_of(span.largest));",
                "scale[row] = larger(scale[row], span.largest);"),
    ),
    "a vector beyond the row is read": (
        "fake_quantize", "asan",
        edit_of("fake_quantize", "member < vectors) held[d]", "member <= vectors) held[d]"),
    ),
    "zeros lose their sign": (
        "fake_quantize", "plain",
        edit_of("quant_range", "math::bits_of(whole) | (math::bits_of(values[j]) & ~math::kMagnitudeBits)",
                "math::bits_of(whole)"),
    ),
    "mask bits of neighbours overlap": (
        "fake_quantize", "plain", edit_of("span", "(~0u, bits, 1) << 4;", "(~0u, bits, 1) << 3;"),
    ),
    "short rows: the range of another row": (
        "fake_quantize", "plain", edit_of("fake_quantize", "= i / vectors_per_row;", "= i / (vectors_per_row + 1);"),
    ),
    "small floats: a block's maximum leaves out half of its lanes": (
        "fake_quantize_float", "plain", edit_of("small_blocks", "distance = sharing / 2;", "distance = sharing / 4;"),
    ),
    "small floats: lanes without a vector do not come to the shuffles": (
        "fake_quantize_float", "plain",
        edit_of("small_blocks", "        Span<true> span;\n",
                "        if (i >= vectors) continue;\n        Span<true> span;\n"),
    ),
    "small floats: a vector beyond the last block is read": (
        "fake_quantize_float", "asan",
        edit_of("small_blocks", "if (begin + u * threads < vectors)", "if (begin + u * threads <= vectors)"),
    ),
    "small floats: all lanes of a block write its scale": (
        "fake_quantize_float", "tsan",
        edit_of("small_blocks", "if (i < vectors && i % static_cast<unsigned>(sharing) == 0)", "if (i < vectors)"),
    ),
    "small floats: no subnormal numbers": (
        "fake_quantize_float", "plain",
        Edit(FORMAT, "    if (exponent < steps.smallest_bits) exponent = steps.smallest_bits;\n", ""),
    ),
    "small floats: the constant that rounds overflows": (
        "fake_quantize_float", "plain",
        edit_of("small_floats", "smaller(magnitude, math::kBeyondFormats)", "magnitude"),
    ),
    "small floats: zeros lose their sign": (
        "fake_quantize_float", "plain",
        edit_of("small_floats", "math::with_sign_of(smaller(read_back, work.limit), value)",
                "value < 0.0f ? -smaller(read_back, work.limit) : smaller(read_back, work.limit)"),
    ),
    "small floats: an amax that would saturate keeps its power of two": (
        "fake_quantize_float", "plain", Edit(FORMAT, "(largest_bits + format.scale_rounding)", "largest_bits"),
    ),
    "min.NaN: without its NaN": (
        "fake_quantize_float", "ptx", Edit(DEVICE, "min.NaN.f32 %0, %1, %2;", "min.f32 %0, %1, %2;"),
    ),
    "a block's maximum leaves out half of its lanes": (
        "block_quantize", "plain", edit_of("block_quantize", "distance = sharing / 2;", "distance = sharing / 4;"),
    ),
    "some lanes do not come to the reduction": (
        "block_quantize", "plain",
        edit_of("block_quantize", "    const unsigned largest = largest_of<sharing>(",
                "    if (!is_mine) return;\n    const unsigned largest = largest_of<sharing>("),
    ),
    "a lane without a block writes another's": (
        "block_quantize", "tsan", edit_of("block_quantize", "if (is_mine) target.template", "target.template"),
    ),
    "a residual is written where the block is not finite": (
        "block_quantize", "plain", edit_of("block_quantize", "if (!coder.is_finite) continue;", ""),
    ),
    "residuals are overwritten while lanes still read them": (
        "block_quantize", "tsan", edit_of("block_quantize", "    __syncwarp();  // the", "    // the"),
    ),
    "a payload after the last is added": (
        "block_quantize", "asan", edit_of("payload", "pair < payload_count / 2;", "pair <= payload_count / 2;"),
    ),
    "int4 values keep the sign turned": (
        "block_quantize", "plain", edit_of("payload", "- constant) ^ 0x88888888u)", "- constant))"),
    ),
}  # fmt: skip


# Fewer kernels, which compile sooner: blocks of 256 and 1024 then go the way of any length.
FEWER = {
    "block_quantize": [
        Edit(
            f"{FOLDER}/block_quantize.cu",
            f"        case {length}:\n            return run(Shape<{shape}>());\n",
            "",
        )
        for length, shape in ((256, "16, depth"), (1024, "32, 32 / width"))
    ]
}


def outcome_of(bug: str) -> object:
    source, mode, edit = BUGS[bug]
    check(
        harness.build(f"{FOLDER}/{source}.cu", mode, [edit, *FEWER.get(source, [])]), list(CASES[source]()), 3
    )
    return None


def test_planted_bugs_are_caught() -> None:
    found = harness.in_parallel([functools.partial(outcome_of, bug) for bug in BUGS])
    for bug, outcome in zip(BUGS, found, strict=True):
        mode = BUGS[bug][1]
        assert isinstance(outcome, (harness.Fault, AssertionError)), f"not caught: {bug}: {outcome!r}"
        if mode in ("asan", "tsan"):
            assert "Sanitizer" in str(outcome), f"not caught by {mode}: {bug}: {str(outcome)[:500]}"
