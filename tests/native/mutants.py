"""Planted bugs: changes of the real sources, and the tier that must see each of them."""

from __future__ import annotations

from dataclasses import dataclass

from tests.native.emulator.harness import Edit
from tests.native.linear_cases import LinearCase

HERE = "csrc/cuda/linear/"
DEVICE = "csrc/include/ds_compress/device.h"


@dataclass(frozen=True)
class Mutant:
    """`seen_by`: compile, machine code, exactness (of the PTX), plain, asan, tsan, conflicts, ptx.

    `report`: words of its report. `silent`: the results stay right, so that the plain run must pass. `kernel`: the
    part of a kernel's name that `harness.build` calls `only`.
    """

    name: str
    seen_by: str
    report: str
    source: str
    edits: tuple[Edit, ...]
    cases: tuple[LinearCase, ...] = ()
    silent: bool = False
    kernel: str = ""


INT8 = (LinearCase(70, 66, 333), LinearCase(9, 65, 70))
SMALL_INT8 = (LinearCase(40, 65, 70, bias=False),)
INT4_FEW = (LinearCase(3, 17, 3100, "int4", 64),)
INT8_FEW = (LinearCase(3, 17, 5000),)
ONE_ROW = (LinearCase(1, 300, 700),)
INT4_ONE_ROW = (LinearCase(1, 17, 3100, "int4", 64),)
MANY_FEATURES = (LinearCase(3, 300, 64),)  # three tiles for a block

MUTANTS = [
    # --- compile: nvcc refuses -------------------------------------------------------------------------------
    Mutant(
        "registers for four blocks where there are two: spills", "compile", "Registers are spilled", "int8_linear",
        (Edit(HERE + "int8_gemm.cuh", "__launch_bounds__(Tile::threads, Tile::blocks)",
              "__launch_bounds__(Tile::threads, 4)"),),
    ),
    # --- machine code: it compiles, but not to what was meant ---------------------------------------------------
    Mutant(
        "half of the products leave the tensor cores", "machine code", "16 IMMA, not 32", "int8_linear",
        (Edit(HERE + "int8_gemm.cuh", "mma_s8_16x8x32(sums[i][j][1], a[i], b[j][2], b[j][3]);",
              "sums[i][j][1][0] = __dp4a(int(a[i][0]), int(b[j][2]), sums[i][j][1][0]);"),),
    ),
    Mutant(
        "an array indexed at run time goes to local memory", "machine code", "stack 16", "quantize",
        (Edit(HERE + "quantize.cuh", "words[i] = __byte_perm(first,",
              "words[(i + quantized[i]) % 4] = __byte_perm(first,"),),
    ),
    Mutant(
        "an approximate division in the quantization", "exactness", "div.approx", "quantize",
        (Edit("csrc/include/ds_compress/math.h", "__fdiv_rn(a, b)", "__fdividef(a, b)"),),
    ),
    # --- plain: the source runs to a wrong result, or the emulator stops it -------------------------------------
    Mutant(
        "cp.async: waits for one group too few", "plain", "differ", "int8_linear",
        (Edit(HERE + "tile.cuh", "wait_copies<stages - 2>();", "wait_copies<stages - 1>();"),), INT8,
    ),
    Mutant(
        "cp.async: a group is not committed", "plain", "differ", "int8_linear",
        (Edit(HERE + "tile.cuh", "        commit_copies();\n        multiply(reading, step);",
              "        multiply(reading, step);"),), INT8,
    ),
    Mutant(
        "ring: copies go to the stage that is being read", "plain", "differ", "int8_linear",
        (Edit(HERE + "tile.cuh", "start(writing, step + stages - 1)", "start(reading, step + stages - 1)"),), INT8,
    ),
    Mutant(
        "epilogue: the scale of the neighbouring column", "plain", "differ", "int8_linear",
        (Edit(HERE + "epilogue.cuh", "e.weight_scale[column]", "e.weight_scale[column / 2 * 2]"),), SMALL_INT8,
    ),
    Mutant(
        "a collective that only some lanes reach", "plain", "deadlock", "quantize",
        (Edit(HERE + "quantize.cuh", "    value = __reduce_max_sync(~0u, value);",
              "    if (value != 0) value = __reduce_max_sync(~0u, value);"),),
    ),
    Mutant(
        "few rows: a warp waits for one group too few", "plain", "differ", "int8_linear",
        (Edit(HERE + "skinny.cuh", "wait_copies<stages - 2>();", "wait_copies<stages - 1>();"),), INT8_FEW,
    ),
    Mutant(
        "few rows: copies go to the stage that is being read", "plain", "differ", "int8_linear",
        (Edit(HERE + "skinny.cuh", "        start(writing);", "        start(reading);"),), INT8_FEW,
    ),
    Mutant(
        "few rows: the scale of the neighbouring group", "plain", "differ", "int4_linear",
        (Edit(HERE + "int4_skinny.cuh", "index * Tile::groups + row,", "index * Tile::groups + (row ^ 1),"),), INT4_FEW,
    ),
    Mutant(
        "few rows: a total is not cleared for the next tile of features", "plain", "differ", "int8_linear",
        (Edit(HERE + "int8_skinny.cuh", "            total = 0;\n", ""),), MANY_FEATURES,
    ),
    Mutant(
        "more stages than shared memory has room for", "plain", "dsc_int8_linear returned 1", "int8_linear",
        (Edit(HERE + "int8_gemm.cuh", "stages = 4, chunks = 4", "stages = 7, chunks = 4"),), INT8,
    ),
    Mutant(
        "one row: a lane finishes the sum of another feature", "plain", "differ", "int8_linear",
        (Edit(HERE + "int8_row.cuh", "if (lane == done) mine = sum;", "if (lane == (done ^ 1)) mine = sum;"),), ONE_ROW,
    ),
    Mutant(
        "one row: the scale of the group 32 further", "plain", "differ", "int4_linear",
        (Edit(HERE + "int4_row.cuh", "(sums[its_group] >> 4), scale[i]);", "(sums[its_group] >> 4), scale[i ^ 1]);"),),
        INT4_ONE_ROW,
    ),
    # --- conflicts: right, but eight rows share banks -----------------------------------------------------------
    Mutant(
        "tiles without the permutation of chunks", "conflicts", "bank conflicts", "int8_linear",
        (Edit(HERE + "tile.cuh", "(chunk ^ (row / (8 / chunks) % chunks))", "chunk"),), SMALL_INT8, silent=True,
    ),
    # --- asan: outside of an array ------------------------------------------------------------------------------
    Mutant(
        "a tail reads beyond x", "asan", "heap-buffer-overflow", "quantize",
        (Edit(HERE + "quantize.cuh", "column + i < columns ? to_float(row[column + i]) : 0.0f",
              "column + i < columns + 1 ? to_float(row[column + i]) : 0.0f"),),
    ),
    Mutant(
        "a scale beyond the last is read, and not used", "asan", "heap-buffer-overflow", "int8_linear",
        (Edit(HERE + "epilogue.cuh", "out_column + j < e.n ? out_column + j : e.n - 1", "out_column + j"),),
        SMALL_INT8, silent=True,
    ),
    Mutant(
        "a shared array written beyond its end", "asan", "use-after-poison", "quantize",
        (Edit(HERE + "quantize.cuh", "partial[threadIdx.x / 32] = value;", "partial[threadIdx.x / 32 + 1] = value;"),),
    ),
    # --- tsan: races, most of which give the right result -------------------------------------------------------
    Mutant(
        "no barrier between the copies and their use", "tsan", "data race", "int8_linear",
        (Edit(HERE + "tile.cuh", "any more.\n        __syncthreads();", "any more."),), SMALL_INT8,
    ),
    Mutant(
        "every thread writes the scale of its row: the right value", "tsan", "data race", "quantize",
        (Edit(HERE + "quantize.cuh", "if (threadIdx.x % threads_per_row == 0) *scale_to = scale;",
              "*scale_to = scale;"),), silent=True,
    ),
    Mutant(
        "few rows: parts are overwritten while others still add them", "tsan", "data race", "int4_linear",
        (Edit(HERE + "int4_skinny.cuh",
              "if (turns.twice)\n                is_second = !is_second;\n"
              "            else\n                __syncthreads();", ""),),
        INT4_FEW,
    ),
    Mutant(
        "few rows: a lane reads what another copied before it is told", "tsan", "data race", "int4_linear",
        (Edit(HERE + "skinny.cuh", "wait_copies<stages - 2>();\n        __syncwarp();",
              "wait_copies<stages - 2>();"),), INT4_FEW,
    ),
    Mutant(
        "two blocks write the same rows: the right values", "tsan", "data race", "quantize",
        (Edit(HERE + "quantize.cuh", "static_cast<int64_t>(blockIdx.x) * rows_per_block",
              "static_cast<int64_t>(blockIdx.x / 2) * rows_per_block"),
         Edit(HERE + "quantize.cu", "dim3(static_cast<unsigned>(rows))", "dim3(static_cast<unsigned>(rows * 2))"),
         Edit(HERE + "quantize.cu", "dim3(static_cast<unsigned>(blocks))", "dim3(static_cast<unsigned>(blocks * 2))"),
         ), silent=True,
    ),
    Mutant(
        "one row: quantized values are read before the block has written them", "tsan", "data race", "int8_linear",
        (Edit(HERE + "tokens.cuh", "to, scale);\n        __syncthreads();", "to, scale);"),), ONE_ROW,
    ),
    # --- ptx: inline assembly, which the runs of the source replace ---------------------------------------------
    Mutant(
        "mma: two operands swapped", "ptx", "differ", "int8_linear",
        (Edit(DEVICE, '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));',
              '"r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3]), "r"(b0), "r"(b1));'),), SMALL_INT8, kernel="Li64E",
    ),
    Mutant(
        "cp.async: no zeros beyond the ends", "ptx", "differ", "int8_linear",
        (Edit(DEVICE, "const int bytes = valid ? 16 : 0;", "const int bytes = 16;"),), SMALL_INT8, kernel="Li64E",
    ),
    Mutant(
        "cp.async: wait_group waits for a constant", "ptx", "differ", "int8_linear",
        (Edit(DEVICE, '"cp.async.wait_group %0;" ::"n"(pending)', '"cp.async.wait_group 3;" ::"n"(pending)'),),
        SMALL_INT8, kernel="Li64E",
    ),
]  # fmt: skip
