// What chooses the weights that stay: N:M groups and histograms of magnitudes.
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

// Few and large blocks: every one adds its counts to those in global memory.
constexpr int histogram_threads = 1024, histogram_unroll = 2;
constexpr int histogram_blocks = 2;  // on a multiprocessor
constexpr int histogram_copies = 2;  // a power of two

DSC_DEVICE float narrowed(float value) { return value; }
DSC_DEVICE float narrowed(double value) { return static_cast<float>(value); }
DSC_DEVICE float narrowed(__nv_bfloat16 value) { return to_float(value); }
DSC_DEVICE float narrowed(__half value) { return to_float(value); }

/// Counts in shared memory where `bins` fit there, else in global memory at once. `copies` of the shared histogram, each
/// for every so manieth lane, lie in different banks: few lanes of a warp then meet in one place.
template <class T, bool shared>
__global__ void __launch_bounds__(histogram_threads)
    magnitude_histogram_kernel(const T* __restrict__ values, int64_t count, int shift, int bins, int prefix_shift,
                               unsigned prefix, int copies, unsigned long long* __restrict__ counts) {
    constexpr int width = Vector<T>::count;
    DSC_DYNAMIC_SHARED(unsigned, own);
    if (shared) {
        for (int i = static_cast<int>(threadIdx.x); i < bins * copies; i += histogram_threads) own[i] = 0;
        __syncthreads();
    }
    const unsigned copy = threadIdx.x & static_cast<unsigned>(copies - 1);
    const auto add = [&](T value) {
        const unsigned bits = math::bits_of(narrowed(value)) & math::kMagnitudeBits;
        if (bits >> prefix_shift != prefix) return;
        const unsigned bin = (bits >> shift) & static_cast<unsigned>(bins - 1);
        if (shared)
            atomicAdd(own + bin * static_cast<unsigned>(copies) + copy, 1u);
        else
            atomicAdd(counts + bin, 1ull);
    };
    const int ahead = static_cast<int>((0 - reinterpret_cast<uintptr_t>(values)) % 16 / sizeof(T));
    const int64_t head = ahead < count ? ahead : count;
    const int64_t vectors = (count - head) / width;
    for (int64_t begin = static_cast<int64_t>(blockIdx.x) * histogram_threads * histogram_unroll; begin < vectors;
         begin += static_cast<int64_t>(gridDim.x) * histogram_threads * histogram_unroll) {
        Vector<T> here[histogram_unroll];
#pragma unroll
        for (int u = 0; u < histogram_unroll; u++) {
            const int64_t i = begin + u * histogram_threads + threadIdx.x;
            if (i < vectors) here[u] = load_passing_vector(values + head + i * width);
        }
#pragma unroll
        for (int u = 0; u < histogram_unroll; u++) {
            if (begin + u * histogram_threads + threadIdx.x >= vectors) continue;
#pragma unroll
            for (int j = 0; j < width; j++) add(here[u].values[j]);
        }
    }
    const int64_t singles = head + (count - head) % width;
    for (int64_t i = first_item(); i < singles; i += stride()) add(values[i < head ? i : vectors * width + i]);
    if (shared) {
        __syncthreads();
        for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += histogram_threads) {
            unsigned sum = 0;
            for (int i = 0; i < copies; i++) sum += own[bin * copies + i];
            if (sum != 0) atomicAdd(counts + bin, static_cast<unsigned long long>(sum));
        }
    }
}

}  // namespace ds_compress::elementwise
