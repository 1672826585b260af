// Tiles in shared memory: how they get there and how tensor cores read them.
//
// A tile is rows of 16-byte chunks, the chunks of a row permuted by an exclusive or so that the eight rows that
// ldmatrix reads together lie in eight different 16-byte banks, without padding.
#pragma once

#include "ds_compress/device.h"

namespace ds_compress::linear {

/// The byte offset of a chunk; `chunks` per row: 2, 4 or 8, or 16 of a tile that ldmatrix does not read.
template <int chunks>
DSC_DEVICE int chunk_offset(int row, int chunk) {
    static_assert(chunks == 2 || chunks == 4 || chunks == 8 || chunks == 16);
    if constexpr (chunks == 16)
        return (row * chunks + chunk) * 16;
    else
        return (row * chunks + (chunk ^ (row / (8 / chunks) % chunks))) * 16;
}

/// Brings tiles of `rows` rows and 16 `chunks` bytes from a matrix to shared memory; zeros beyond its ends.
/// A thread has the same chunk of every row_step-th row, so little more than one address needs a register.
template <int rows, int chunks, int threads>
struct TileLoader {
    static constexpr int row_step = threads / chunks;
    static_assert(threads % chunks == 0 && row_step % 8 == 0);  // so the permutation of my chunk stays the same

    const int8_t *matrix, *mine;
    int pitch, rows_left, bytes_left, offset;

    /// Of a matrix with `matrix_rows` rows of `pitch` bytes, the rows from `first_row` on.
    DSC_DEVICE TileLoader(const int8_t* matrix, int64_t pitch, int64_t matrix_rows, int64_t first_row)
        : matrix(matrix), pitch(static_cast<int>(pitch)) {
        const int row = threadIdx.x / chunks, chunk = threadIdx.x % chunks;
        const int64_t left = matrix_rows - first_row - row;
        mine = matrix + (first_row + row) * pitch + chunk * 16;
        rows_left = left < rows - row ? static_cast<int>(left) : rows - row;
        bytes_left = this->pitch - chunk * 16;
        offset = chunk_offset<chunks>(row, chunk);
    }

    /// Starts the copies of the tile whose rows begin at byte `first_byte`.
    DSC_DEVICE void start(int8_t* tile, int first_byte) const {
#pragma unroll
        for (int row = 0; row < rows; row += row_step) {
            if (row_step > rows && static_cast<int>(threadIdx.x) >= rows * chunks) break;  // more threads than chunks
            const bool valid = row < rows_left && first_byte < bytes_left;
            const int8_t* const from = valid ? mine + (static_cast<int64_t>(row) * pitch + first_byte) : matrix;
            copy_async_16(tile + offset + row * chunks * 16, from, valid);
        }
    }
};

// The permutation repeats every eight rows, so `row`, a multiple of 8, is added outside of it: the part that depends
// on the lane is the same for all tiles of a warp, and costs one register.

/// mma's operand a: 16 rows from `row` on, 32 bytes from `chunk` on.
template <int chunks>
DSC_DEVICE void load_16_rows(uint32_t (&fragment)[4], const int8_t* tile, int row, int chunk) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(fragment, tile + row * chunks * 16 + chunk_offset<chunks>(lane % 16, chunk + lane / 16));
}

/// mma's operand b, twice: columns (rows of the tile) row .. + 7 in [0], [1] and row + 8 .. + 15 in [2], [3].
template <int chunks>
DSC_DEVICE void load_16_columns(uint32_t (&fragment)[4], const int8_t* tile, int row, int chunk) {
    const int lane = threadIdx.x % 32, mine = lane / 16 * 8 + lane % 8;
    ldmatrix_x4(fragment, tile + row * chunks * 16 + chunk_offset<chunks>(mine, chunk + lane / 8 % 2));
}

/// mma.sp's operand b: eight columns (rows of the tile), 64 bytes from `chunk` on.
template <int chunks>
DSC_DEVICE void load_8_columns(uint32_t (&fragment)[4], const int8_t* tile, int row, int chunk) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(fragment, tile + row * chunks * 16 + chunk_offset<chunks>(lane % 8, chunk + lane / 8));
}

/// The ring of stages in shared memory: `start(stage, step)` starts the copies of a k-step into a stage,
/// `multiply(stage, step)` uses it. While one is multiplied, stages - 1 are on their way.
template <int stages, class Start, class Multiply>
DSC_DEVICE void pipeline(int steps, Start start, Multiply multiply) {
    for (int step = 0; step < stages - 1; step++) {
        if (step < steps) start(step, step);
        commit_copies();
    }
    int reading = 0, writing = stages - 1;
    for (int step = 0; step < steps; step++) {
        wait_copies<stages - 2>();
        // My copies of this step are there; now everybody's are, and nobody reads the stage before any more.
        __syncthreads();
        if (step + stages - 1 < steps) start(writing, step + stages - 1);
        commit_copies();
        multiply(reading, step);
        reading = reading + 1 == stages ? 0 : reading + 1;
        writing = writing + 1 == stages ? 0 : writing + 1;
    }
    __syncthreads();  // the stages may be reused for something else
}

}  // namespace ds_compress::linear
