// What chooses the weights that stay: N:M groups and histograms of magnitudes.
#pragma once

#include "ds_compress/math.h"
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

DSC_DEVICE float narrowed(float value) { return value; }
DSC_DEVICE float narrowed(double value) { return static_cast<float>(value); }
DSC_DEVICE float narrowed(__nv_bfloat16 value) { return to_float(value); }
DSC_DEVICE float narrowed(__half value) { return to_float(value); }

/// Counts in shared memory where `bins` fit there, else in global memory at once.
template <class T, bool shared>
__global__ void __launch_bounds__(threads)
    magnitude_histogram_kernel(const T* __restrict__ values, int64_t count, int shift, int bins, int prefix_shift,
                               unsigned prefix, unsigned long long* __restrict__ counts) {
    DSC_DYNAMIC_SHARED(unsigned, own);
    if (shared) {
        for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += threads) own[bin] = 0;
        __syncthreads();
    }
    for (int64_t i = first_item(); i < count; i += stride()) {
        const unsigned bits = math::bits_of(narrowed(values[i])) & math::kMagnitudeBits;
        if (bits >> prefix_shift != prefix) continue;
        const unsigned bin = (bits >> shift) & static_cast<unsigned>(bins - 1);
        if (shared)
            atomicAdd(own + bin, 1u);
        else
            atomicAdd(counts + bin, 1ull);
    }
    if (shared) {
        __syncthreads();
        for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += threads)
            if (own[bin] != 0) atomicAdd(counts + bin, static_cast<unsigned long long>(own[bin]));
    }
}

}  // namespace ds_compress::elementwise
