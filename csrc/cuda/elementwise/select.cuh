// N:M selection: the n largest scores of every m.
#pragma once

#include "grid.cuh"

namespace ds_compress::elementwise {

/// Integers in the order of the scores: -0.0 equals +0.0, NaN is the largest.
DSC_DEVICE int order_key(float score) {
    if (score != score) return 0x7fffffff;
    const int bits = static_cast<int>(math::bits_of(math::add(score, 0.0f)));
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

/// A thread makes one byte: it ranks eight elements, each in its own run of m.
__global__ void __launch_bounds__(threads)
    mask_n_of_m_kernel(const float* __restrict__ scores, int64_t rows, int64_t columns, int64_t n, int64_t m,
                       uint8_t* __restrict__ packed) {
    const int64_t count = rows * columns;
    for (int64_t byte = first_item(); byte * 8 < count; byte += stride()) {
        unsigned bits = 0;
        int64_t column = byte * 8 % columns;
        for (int j = 0; j < 8 && byte * 8 + j < count; j++) {
            const int64_t element = byte * 8 + j;
            const int64_t begin = element - column % m;
            const int64_t left = columns - (column - column % m);  // the last run of a row may be short
            const int64_t end = begin + (left < m ? left : m);
            const int mine = order_key(scores[element]);
            int64_t rank = 0;
            for (int64_t k = begin; k < end; k++) {
                const int other = order_key(scores[k]);
                rank += k < element ? other >= mine : other > mine;
            }
            if (rank < n) bits |= 1u << j;
            column = column + 1 < columns ? column + 1 : 0;
        }
        packed[byte] = static_cast<uint8_t>(bits);
    }
}

/// Runs of `m`, all whole: a thread ranks eight elements in registers and makes one byte, twice.
template <int m>
__global__ void __launch_bounds__(threads)
    mask_runs_kernel(const float* __restrict__ scores, int64_t count, int n, uint8_t* __restrict__ packed) {
    constexpr int each = 2;
    const int64_t bytes = count / 8;
    for (int64_t begin = static_cast<int64_t>(blockIdx.x) * threads * each; begin < bytes;
         begin += static_cast<int64_t>(gridDim.x) * threads * each) {
        Vector<float> halves[each][2];
#pragma unroll
        for (int u = 0; u < each; u++) {
            const int64_t byte = begin + u * threads + threadIdx.x;
            if (byte >= bytes) continue;
            halves[u][0] = load_passing_vector(scores + 8 * byte);
            halves[u][1] = load_passing_vector(scores + 8 * byte + 4);
        }
#pragma unroll
        for (int u = 0; u < each; u++) {
            const int64_t byte = begin + u * threads + threadIdx.x;
            if (byte >= bytes) continue;
            int keys[8];
#pragma unroll
            for (int j = 0; j < 8; j++) keys[j] = order_key(halves[u][j / 4].values[j % 4]);
            unsigned bits = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                int rank = 0;
#pragma unroll
                for (int k = j / m * m; k < j / m * m + m; k++)
                    if (k != j) rank += k < j ? keys[k] >= keys[j] : keys[k] > keys[j];
                if (rank < n) bits |= 1u << j;
            }
            packed[byte] = static_cast<uint8_t>(bits);
        }
    }
}

}  // namespace ds_compress::elementwise
