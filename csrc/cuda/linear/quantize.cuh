// Rows of activations as int8 values with one scale a row; the numerics are those of csrc/README.md.
//
// A row's largest magnitude, then its quantized values. Short rows take one warp each where there are many, else rows
// take a block. A thread handles 16 columns at a time and stores them at once.
#pragma once

#include "ds_compress/device.h"
#include "ds_compress/division.h"
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

/// Sixteen values without a NaN, quantized, four to a word. `given`: quotients may be of any size, even infinite.
DSC_DEVICE uint4 encode_chunk(const float (&values)[chunk], const math::Divisor& scale, float low, bool given) {
    unsigned quantized[chunk];
#pragma unroll
    for (int i = 0; i < chunk; i++) {
        const float q = given ? math::any_quotient(values[i], scale) : math::quotient(values[i], scale);
        // Clamped first, since the bounds are whole; then the nearest integer is in the lowest bits of the sum.
        quantized[i] = math::bits_of(math::add(fminf(fmaxf(q, low), 127.0f), math::kRound));
    }
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned first = __byte_perm(quantized[i * 4], quantized[i * 4 + 1], 0x0040);
        words[i] = __byte_perm(first, __byte_perm(quantized[i * 4 + 2], quantized[i * 4 + 3], 0x0040), 0x5410);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
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
        : values(values),
          columns(columns),
          whole(columns % chunk == 0 && reinterpret_cast<uintptr_t>(matrix) % 16 == 0) {}
};

/// The first chunks of a row that this thread handles, already on their way.
template <class T, int threads_per_row, int held>
struct HeldChunks {
    float values[held][chunk];

    DSC_DEVICE explicit HeldChunks(const Row<T>& row) {
        const int64_t first = threadIdx.x % threads_per_row * chunk;
#pragma unroll
        for (int h = 0; h < held; h++) {
            const int64_t column = first + h * threads_per_row * chunk;
            if (column < row.columns) load_chunk(values[h], row.values, column, row.columns, row.whole);
        }
    }
};

/// The quantized values of a row, zeros from its end to `padded`, and its scale, by threads_per_row threads. What a
/// thread's registers hold of the row is read once; the rest a second time, from L1 or L2.
template <class T, int threads_per_row, int held>
DSC_DEVICE void quantize_row(const Row<T>& row, const HeldChunks<T, threads_per_row, held>& early,
                             const float* given_scale, int steps, int64_t padded, int8_t* quantized, float* scale_to) {
    const int64_t first = threadIdx.x % threads_per_row * chunk;
    constexpr int64_t turn = threads_per_row * chunk;
    const auto& kept = early.values;
    unsigned largest = 0;
    const auto measure = [&](const float (&values)[chunk]) {
#pragma unroll
        for (int i = 0; i < chunk; i++) largest = max(largest, math::bits_of(values[i]) & math::kMagnitudeBits);
    };
#pragma unroll
    for (int h = 0; h < held; h++)
        if (first + h * turn < row.columns) measure(kept[h]);
    float values[chunk];
    for (int64_t column = first + held * turn; column < row.columns; column += turn) {
        load_chunk(values, row.values, column, row.columns, row.whole);
        measure(values);
    }
    largest = row_maximum<threads_per_row>(largest);
    float scale;
    if (given_scale == nullptr)
        scale = math::row_scale(largest, static_cast<float>(steps));
    else
        scale = largest > math::kInfinityBits ? math::float_of(math::kNanBits) : *given_scale;
    if (threadIdx.x % threads_per_row == 0) *scale_to = scale;

    const math::Divisor divisor = math::divisor_of(scale);
    const float low = static_cast<float>(-steps);
    const bool given = given_scale != nullptr, is_number = scale == scale;  // a row with a NaN has quantized values 0
    const auto encode = [&](const float (&from)[chunk], int64_t column) {
        *reinterpret_cast<uint4*>(quantized + column) =
            is_number ? encode_chunk(from, divisor, low, given) : make_uint4(0, 0, 0, 0);
    };
#pragma unroll
    for (int h = 0; h < held; h++)
        if (first + h * turn < padded) encode(kept[h], first + h * turn);
    for (int64_t column = first + held * turn; column < padded; column += turn) {
        load_chunk(values, row.values, column, row.columns, row.whole);
        encode(values, column);
    }
}

/// x (rows, columns) -> quantized (rows, padded_columns), scales (rows,).
template <class T, int threads_per_row>
__global__ void __launch_bounds__(quantize_threads)
    quantize_rows_kernel(const T* __restrict__ x, const float* __restrict__ given_scale, int64_t rows, int64_t columns,
                         int64_t padded_columns, int steps, int8_t* __restrict__ quantized,
                         float* __restrict__ scales) {
    constexpr int rows_per_block = quantize_threads / threads_per_row;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
    if (index >= rows) return;  // whole warps: every thread of a row leaves
    const Row<T> row(x + index * columns, x, columns);
    quantize_row(row, HeldChunks<T, threads_per_row, 2>(row), given_scale, steps, padded_columns,
                 quantized + index * padded_columns, scales + index);
}

}  // namespace ds_compress::linear
