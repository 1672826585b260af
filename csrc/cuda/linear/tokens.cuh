// The few rows of x that a skinny product has (up to 32), as int8 codes: from an earlier launch of quantize_rows_kernel, or
// quantized by the block itself, which saves that launch and is worth it while the rows are short and few.
#pragma once

#include "ds_compress/device.h"
#include "packed.cuh"
#include "quantize.cuh"

namespace ds_compress::linear {

/// Rows in memory; a row beyond the last one is the last one: what comes of it is not stored.
struct Tokens {
    static constexpr bool raw = false;
    const int8_t* codes;
    int64_t pitch;
    int count;
    const float* scales;

    DSC_DEVICE const int8_t* row(int token) const {
        return codes + static_cast<int64_t>(token < count ? token : count - 1) * pitch;
    }
};

/// Rows of x that every block quantizes for itself.
template <class T>
struct RawTokens {
    static constexpr bool raw = true;
    const T* x;
    const float* given_scale;
    int steps;
};

/// Shared memory that a block needs for `count` rows of k codes of its own: the codes, padded so that the rows that a warp
/// reads together lie in different banks, and the scales.
__host__ __device__ constexpr int64_t own_pitch(int64_t k) { return rounded_up(k, 64) + 64; }
__host__ __device__ constexpr int64_t own_tokens_bytes(int64_t count, int64_t k) {
    return count * own_pitch(k) + rounded_up(count * 4, 16);
}

/// Whether so few values are worth a block's own quantization.
__host__ __device__ constexpr bool quantizes_itself(int64_t count, int64_t k) {
    return count > 0 && count <= 8 && count * k <= 16384;
}

/// Blocks for n features where every block quantizes x: as many as fit at once, four to a multiprocessor.
inline dim3 skinny_grid(int64_t n) {
    const int64_t tiles = (n + 15) / 16, resident = 4 * multiprocessors();
    return dim3(static_cast<unsigned>(tiles < resident ? tiles : resident));
}

/// The rows of x as codes in `shared`, by the whole block of quantize_threads; ends with a barrier.
template <class T>
DSC_DEVICE Tokens quantize_tokens(const RawTokens<T>& raw, int count, int64_t k, int8_t* shared) {
    const int64_t pitch = own_pitch(k), padded = int8_row_bytes(k);
    float* const scales = reinterpret_cast<float*>(shared + count * pitch);
    for (int token = 0; token < count; token++) {
        const Row<T> row(raw.x + token * k, raw.x, k);
        const float scale = row_scale<T, quantize_threads>(row, raw.given_scale, raw.steps);
        if (threadIdx.x == 0) scales[token] = scale;
        encode_row<T, quantize_threads>(row, scale, raw.steps, padded, shared + token * pitch);
        __syncthreads();
    }
    return {shared, pitch, count, scales};
}

/// Launched with codes, or with x itself.
DSC_DEVICE Tokens tokens_of(const Tokens& tokens, int, int64_t, int8_t*) { return tokens; }
template <class T>
DSC_DEVICE Tokens tokens_of(const RawTokens<T>& raw, int count, int64_t k, int8_t* shared) {
    return quantize_tokens(raw, count, k, shared);
}

}  // namespace ds_compress::linear
