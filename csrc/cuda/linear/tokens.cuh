// The few rows of x that a skinny product has, as int8 values. They come from an earlier launch, and lie in memory or,
// where they fit, in the shared memory of every block; or every block quantizes x itself, which saves that launch and
// is worth it while the rows are short and few.
#pragma once

#include "ds_compress/device.h"
#include "packed.cuh"
#include "quantize.cuh"

namespace ds_compress::linear {

/// What a product reads. A row beyond the last one is the last one: what comes of it is not stored.
struct Tokens {
    const int8_t* quantized;
    int64_t pitch;
    int count;
    const float* scales;

    DSC_DEVICE const int8_t* row(int token) const {
        return quantized + static_cast<int64_t>(token < count ? token : count - 1) * pitch;
    }
};

/// Shared memory of a block for `count` rows of k quantized values: padded, so that the rows that a warp reads together
/// lie in different banks; then the scales.
__host__ __device__ constexpr int64_t shared_pitch(int64_t k) { return rounded_up(k, 64) + 64; }
__host__ __device__ constexpr int64_t shared_tokens_bytes(int64_t count, int64_t k) {
    return count * shared_pitch(k) + rounded_up(count * 4, 16);
}

/// Whether so few values are worth a block's own quantization.
__host__ __device__ constexpr bool quantizes_itself(int64_t count, int64_t k) {
    return count == 1 && k > 0 && k <= 16384;
}
/// Whether so many quantized values are to be copied to every block that needs `others` bytes besides: where they are
/// few, and all fits into the 99 KB that a block has on every GPU.
__host__ __device__ constexpr bool are_copied(int64_t count, int64_t k, int64_t others) {
    const int64_t bytes = shared_tokens_bytes(count, k);
    return bytes <= 32 * 1024 && bytes + others <= 92 * 1024;
}

// The three ways. `begin` comes before the copies of the weights, behind which its own would queue; `end` has the
// tokens, after a barrier, from what `begin` gave.

struct Nothing {};

/// Quantized values that stay where they are.
struct GlobalTokens {
    static constexpr bool shared = false;
    const int8_t* quantized;
    const float* scales;

    DSC_DEVICE Nothing begin(int, int64_t, int8_t*) const { return {}; }
    template <int later_groups>
    DSC_DEVICE Tokens end(Nothing, int count, int64_t k, int8_t*) const {
        __syncthreads();
        return {quantized, int8_row_bytes(k), count, scales};
    }
};

/// Quantized values that every block copies.
struct CopiedTokens {
    static constexpr bool shared = true;
    const int8_t* quantized;
    const float* scales;

    DSC_DEVICE Nothing begin(int count, int64_t k, int8_t* to) const {
        const int64_t chunks = int8_row_bytes(k) / 16, pitch = shared_pitch(k);
        for (int64_t i = threadIdx.x; i < count * chunks; i += quantize_threads)
            copy_async_16(to + i / chunks * pitch + i % chunks * 16, quantized + i * 16, true);
        commit_copies();
        return {};
    }
    /// `later_groups`: groups of copies that were started since.
    template <int later_groups>
    DSC_DEVICE Tokens end(Nothing, int count, int64_t k, int8_t* to) const {
        wait_copies<later_groups>();
        __syncthreads();
        return {to, shared_pitch(k), count, scales};
    }
};

/// x itself, a single row, which every block quantizes.
template <class T>
struct RawTokens {
    static constexpr bool shared = true;
    const T* x;
    const float* given_scale;
    int steps;

    using Early = HeldChunks<T, quantize_threads, 1>;

    DSC_DEVICE Early begin(int, int64_t k, int8_t*) const { return Early(Row<T>(x, x, k)); }
    template <int later_groups>
    DSC_DEVICE Tokens end(const Early& early, int, int64_t k, int8_t* to) const {
        const int64_t pitch = shared_pitch(k);
        float* const scale = reinterpret_cast<float*>(to + pitch);
        quantize_row(Row<T>(x, x, k), early, given_scale, steps, int8_row_bytes(k), to, scale);
        __syncthreads();
        return {to, pitch, 1, scale};
    }
};

}  // namespace ds_compress::linear
