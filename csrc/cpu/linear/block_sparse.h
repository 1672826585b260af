// The int8 linear layer whose weight has whole blocks of zeros, as a table of plain functions like that of linear.h.
//
// A block is 4 outputs x 16 inputs: 64 weights, one register of AVX-512, of which 16 bytes of x meet each quarter. The
// packed form is the same for every instruction set and for ds_compress/ops/reference/block_sparse.py, which makes it:
//     int32 corrections[outputs]        -128 times the sum of an output's weights, for x that is stored as q + 128
//     int32 ends[strips * chunks * 12]  blocks up to and with a group of 4 outputs, within a chunk of 2048 inputs
//     uint16 inputs[blocks]             position of a block: inputs / 16
//     int8 values[blocks * 64]          4 rows of 16
// Outputs are padded to strips of 48. Order: strip, chunk, group, input. Each array begins at a multiple of 64 bytes.
#pragma once

#include "ds_compress/packed.h"
#include "linear.h"

namespace ds_compress::cpu {

constexpr int64_t kBlockOutputs = 4, kBlockInputs = 16, kSparseBlockBytes = kBlockOutputs * kBlockInputs;
constexpr int64_t kStripOutputs = 48, kStripGroups = kStripOutputs / kBlockOutputs;
constexpr int64_t kChunkInputs = 2048;  // 16 rows of them lie in the first-level cache

struct BlockSparseWeight {
    const int32_t* corrections;
    const int32_t* ends;
    const uint16_t* inputs;
    const int8_t* values;
};

inline int64_t chunks_of(int64_t columns) { return (columns + kChunkInputs - 1) / kChunkInputs; }

// Where the arrays lie behind the header, in bytes, and where the last one ends.
struct BlockSparseLayout {
    int64_t ends, inputs, values, bytes;

    BlockSparseLayout(int64_t rows, int64_t columns, int64_t blocks) {
        const int64_t outputs = round_up(rows, kStripOutputs);
        ends = round_up(4 * outputs, 64);
        inputs = ends + round_up(4 * outputs / kBlockOutputs * chunks_of(columns), 64);
        values = inputs + round_up(2 * blocks, 64);
        bytes = values + kSparseBlockBytes * blocks;
    }
};

struct BlockSparseKernels {
    Isa isa;

    // `call.weight` has the shape only.
    void (*linear)(const LinearCall& call, const BlockSparseWeight& weight, Range rows, Range strips, void* scratch);

    // Bytes of scratch, aligned to 64, for rows of `columns`.
    int64_t (*scratch_bytes)(int64_t columns);
};

// The table for `isa()`.
const BlockSparseKernels& block_sparse_kernels();

// Null where the compiler was not told to use these instructions.
const BlockSparseKernels* block_sparse_scalar();
const BlockSparseKernels* block_sparse_avx2();
const BlockSparseKernels* block_sparse_avx512();

}  // namespace ds_compress::cpu
