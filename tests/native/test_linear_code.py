"""The machine code of the linear kernels' inner loops: sums stay in registers, and the loop is as long as planned.

A compiler that spills one sum makes a tile several times slower and changes no result, so only this test sees it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.native import linear_tables

pytestmark = pytest.mark.skipif(not linear_tables.available_tables(), reason="the kernels are for x86-64")

# Instructions of one loop over K per kernel: what multiplies, what adds, what loads. Nothing may touch the stack.
BUDGETS = {
    ("avx2", "int8_tile<4>"): {
        "vpmaddwd": 16,
        "vpaddw": 32,
        "vpaddd": 16,
        "vpbroadcastd": 16,
        "vpmovsxbw": 8,
    },
    ("avx2", "int8_tile<1>"): {"vpmaddwd": 4, "vpaddw": 8, "vpaddd": 4, "vpbroadcastd": 4, "vpmovsxbw": 8},
    ("avx2", "int4_tile<4>"): {"vpmaddubsw": 64, "vpaddw": 64, "vpbroadcastd": 32, "vpmaddwd": 8},
    ("avx512", "int8_tile<8>"): {"vpdpbusd": 24, "vpbroadcastd": 8},
    ("avx512", "int8_tile<1>"): {"vpdpbusd": 3, "vpbroadcastd": 1},
    ("avx512", "int8_amx_tile"): {"tdpbusd": 3, "tileloadd": 4},
    ("avx512", "int4_tile<6>"): {"vpdpbusd": 36, "vpbroadcastd": 12, "vpsrlw": 3},
}
SPILLING = """
#include <immintrin.h>
#include <cstdint>
// Forty sums do not fit into 32 registers, let alone 16.
template <int kRows>
[[gnu::noinline]] void spilling_tile(const int* a, const __m256i* w, int64_t steps, __m256i* to) {
    __m256i s[kRows] = {};
    for (; steps > 0; steps--, a += kRows, w++)
#pragma GCC unroll 64
        for (int r = 0; r < kRows; r++) s[r] = _mm256_add_epi32(s[r], _mm256_madd_epi16(_mm256_set1_epi32(a[r]), *w));
#pragma GCC unroll 64
    for (int r = 0; r < kRows; r++) to[r] = s[r];
}
template void spilling_tile<40>(const int*, const __m256i*, int64_t, __m256i*);
"""


Code = list[tuple[int, str]]


def innermost_loop(code: Code) -> list[str]:
    """The shortest stretch that a backward jump repeats and that multiplies."""
    loops = []
    for address, text in code:
        jump = re.match(r"j\w+\s+([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            body = [t for at, t in code if int(jump[1], 16) <= at <= address]
            if any(re.match(r"vpmadd|vpdp|tdpb", t) for t in body):
                loops.append(body)
    return min(loops, key=len)


def disassembled(object_file: Path, function: str) -> Code:
    """(address, instruction) of one function."""
    listing = linear_tables.run(["objdump", "-d", "--no-show-raw-insn", "-C", str(object_file)])
    block = next(
        b for b in listing.split("\n\n") if re.match(rf"\s*[0-9a-f]+ <.*\b{re.escape(function)}\(", b)
    )
    lines = [line for line in block.splitlines() if "\t" in line]
    return [(int(line.split(":", 1)[0], 16), line.split("\t", 1)[1].strip()) for line in lines]


def stack_moves(code: Code) -> list[str]:
    """Vector instructions with an operand on the stack."""
    return [text for _, text in code if re.search(r"[txyz]mm", text) and re.search(r"\(%r[sb]p", text)]


@pytest.mark.parametrize(("table", "function"), BUDGETS, ids=lambda value: str(value))
def test_the_inner_loop_keeps_its_sums_in_registers(table: str, function: str) -> None:
    code = disassembled(linear_tables.folder() / f"{table}.o", function)
    assert not stack_moves(code)
    loop = innermost_loop(code)
    for instruction, count in BUDGETS[table, function].items():
        found = sum(text.split()[0] == instruction for text in loop)
        assert found == count, f"{instruction}: {found}, planned {count}\n" + "\n".join(loop)


@pytest.mark.parametrize(("isa", "registers"), [("avx2", 16), ("avx512", 32)])
def test_a_tile_that_spills_is_caught(isa: str, registers: int, tmp_path: Path) -> None:
    source = tmp_path / f"spilling_{isa}.cpp"
    source.write_text(SPILLING)
    linear_tables.run(linear_tables.build().command(source, tmp_path / "spilling.o"))
    code = disassembled(tmp_path / "spilling.o", "spilling_tile<40>")
    assert len(stack_moves(code)) >= 40 - registers
    assert sum(text.startswith("vpmaddwd") for text in innermost_loop(code)) == 40
