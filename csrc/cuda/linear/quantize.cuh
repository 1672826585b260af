// Rows of activations as int8 codes with one scale a row; the numerics are those of csrc/README.md.
//
// Two passes over a row, the second of which finds it in L1 or L2: its largest magnitude, then its codes. Short
// rows take one warp each, long rows a block. A thread handles 16 columns at a time and stores them at once.
#pragma once

#include "ds_compress/device.h"
#include "ds_compress/math.h"

namespace ds_compress::linear {

constexpr int chunk = 16;  // columns that a thread handles at a time
constexpr int quantize_threads = 256;

/// Sixteen values from `column` on; beyond the last column 0. `whole`: rows are 16-byte aligned and have no tail.
template <class T>
DSC_DEVICE void load_chunk(float (&values)[chunk], const T* row, int64_t column, int64_t columns, bool whole) {
    constexpr int per_load = 16 / sizeof(T);
    struct alignas(16) Load {
        T values[per_load];
    };
    if (whole) {
#pragma unroll
        for (int i = 0; i < chunk / per_load; i++) {
            const Load load = reinterpret_cast<const Load*>(row + column)[i];
#pragma unroll
            for (int j = 0; j < per_load; j++) values[i * per_load + j] = to_float(load.values[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < chunk; i++) values[i] = column + i < columns ? to_float(row[column + i]) : 0.0f;
    }
}

/// The code of a value; 0 for NaN. low <= 0 <= high.
DSC_DEVICE int encode(float value, float scale, float low, float high) {
    const float code = math::clamp(math::round_half_even(math::divide(value, scale)), low, high);
    return code == code ? static_cast<int>(code) : 0;
}

/// The maximum over the threads that share a row.
template <int threads_per_row>
DSC_DEVICE unsigned row_maximum(unsigned value) {
    value = __reduce_max_sync(~0u, value);
    if constexpr (threads_per_row > 32) {
        constexpr int warps = threads_per_row / 32;
        DSC_SHARED(unsigned, partial, warps);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < warps; i++) value = max(value, partial[i]);
    }
    return value;
}

template <class T>
struct Row {
    const T* values;
    int64_t columns;
    bool whole;
    /// A row of a matrix that begins at `matrix`.
    DSC_DEVICE Row(const T* values, const T* matrix, int64_t columns)
        : values(values), columns(columns),
          whole(columns % chunk == 0 && reinterpret_cast<uintptr_t>(matrix) % 16 == 0) {}
};

/// The scale of a row, in all its threads.
template <class T, int threads_per_row>
DSC_DEVICE float row_scale(const Row<T>& row, const float* given_scale, int steps) {
    float values[chunk];
    unsigned largest = 0;
    for (int64_t column = threadIdx.x % threads_per_row * chunk; column < row.columns;
         column += threads_per_row * chunk) {
        load_chunk(values, row.values, column, row.columns, row.whole);
#pragma unroll
        for (int i = 0; i < chunk; i++) largest = max(largest, math::bits_of(values[i]) & math::kMagnitudeBits);
    }
    largest = row_maximum<threads_per_row>(largest);
    if (given_scale == nullptr) return math::row_scale(largest, static_cast<float>(steps));
    return largest > math::kInfinityBits ? math::float_of(math::kNanBits) : *given_scale;
}

/// The codes of a row, zeros from its end to `padded`; the row's second read finds it in L1 or L2.
template <class T, int threads_per_row>
DSC_DEVICE void encode_row(const Row<T>& row, float scale, int steps, int64_t padded, int8_t* codes) {
    const float low = static_cast<float>(-steps);
    float values[chunk];
    for (int64_t column = threadIdx.x % threads_per_row * chunk; column < padded; column += threads_per_row * chunk) {
        load_chunk(values, row.values, column, row.columns, row.whole);
        unsigned words[4] = {};
#pragma unroll
        for (int i = 0; i < chunk; i++) {
            const unsigned code = static_cast<unsigned>(encode(values[i], scale, low, 127.0f));
            words[i / 4] |= (code & 255u) << i % 4 * 8;
        }
        *reinterpret_cast<uint4*>(codes + column) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

/// x (rows, columns) -> codes (rows, padded_columns), scales (rows,).
template <class T, int threads_per_row>
__global__ void __launch_bounds__(quantize_threads)
    quantize_rows_kernel(const T* __restrict__ x, const float* __restrict__ given_scale, int64_t rows,
                         int64_t columns, int64_t padded_columns, int steps, int8_t* __restrict__ codes,
                         float* __restrict__ scales) {
    constexpr int rows_per_block = quantize_threads / threads_per_row;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
    if (index >= rows) return;  // whole warps: every thread of a row leaves
    const Row<T> row(x + index * columns, x, columns);
    const float scale = row_scale<T, threads_per_row>(row, given_scale, steps);
    if (threadIdx.x % threads_per_row == 0) scales[index] = scale;
    encode_row<T, threads_per_row>(row, scale, steps, padded_columns, codes + index * padded_columns);
}

}  // namespace ds_compress::linear
