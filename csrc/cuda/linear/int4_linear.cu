#include "../dtypes.cuh"
#include "int4_gemm.cuh"
#include "int4_row.cuh"
#include "int4_skinny.cuh"

namespace ds_compress::linear {

template <class Tile>
static cudaError_t int4_gemm(const int8_t* quantized, const void* packed, int64_t k, int group, const Epilogue& e,
                             cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((e.m + Tile::tile_m - 1) / Tile::tile_m),
                    static_cast<unsigned>((e.n + Tile::tile_n - 1) / Tile::tile_n));
    return launch(int4_gemm_kernel<Tile>, grid, Tile::threads, Tile::shared_bytes, stream, quantized, packed, k, group,
                  e);
}

template <class Tile, class Given>
static cudaError_t int4_skinny(const Given& given, const void* packed, int64_t k, const Epilogue& e,
                               cudaStream_t stream) {
    const Turns turns = turns_of(e.m, k, Tile::groups);
    const size_t tokens_bytes = Given::shared ? shared_tokens_bytes(e.m, k) : 0;
    return launch(int4_skinny_kernel<Tile, Given>, skinny_grid(e.n, Tile::features, Tile::blocks), skinny_threads,
                  Tile::ring_bytes + turns.bytes() + tokens_bytes, stream, given, packed, k, turns, e);
}

template <class Tile>
static cudaError_t int4_skinny_of_quantized(const int8_t* quantized, const void* packed, int64_t k, const Epilogue& e,
                                            cudaStream_t stream) {
    if constexpr (Tile::token_tiles <= 2) {
        if (are_copied(e.m, k, Tile::ring_bytes + turns_of(e.m, k, Tile::groups).bytes()))
            return int4_skinny<Tile>(CopiedTokens{quantized, e.input_scale}, packed, k, e, stream);
    }
    return int4_skinny<Tile>(GlobalTokens{quantized, e.input_scale}, packed, k, e, stream);
}

template <int words>
static cudaError_t int4_few(const int8_t* quantized, const void* packed, int64_t k, const Epilogue& e,
                            cudaStream_t stream) {
    if (e.m <= 8) return int4_skinny_of_quantized<Int4Skinny<1, words, 5, 3>>(quantized, packed, k, e, stream);
    if (e.m <= 16) return int4_skinny_of_quantized<Int4Skinny<2, words, 4, 2>>(quantized, packed, k, e, stream);
    if constexpr (words >= 2) {
        if (e.m <= 32) return int4_skinny_of_quantized<Int4Skinny<4, words, 4, 2>>(quantized, packed, k, e, stream);
    }
    if constexpr (words == 4) {
        if (e.m <= 64) return int4_skinny_of_quantized<Int4Skinny<8, words, 4, 2>>(quantized, packed, k, e, stream);
    }
    return cudaErrorNotSupported;
}

/// The rows that the parts of a step in shared memory leave room for: many small groups have many.
static int64_t most_few_rows(int group) { return group == 128 ? 64 : group == 64 ? 32 : 16; }

/// A warp per feature, or, where a row has too many groups for that, 16 features at once.
template <int words, class T>
static cudaError_t int4_row(const RawTokens<T>& raw, const void* packed, int64_t k, const Epilogue& e,
                            cudaStream_t stream) {
    const int64_t groups = (k + words * 32 - 1) / (words * 32);
    if (groups > row_groups) return int4_skinny<Int4Skinny<1, words, 5, 3>>(raw, packed, k, e, stream);
    const int64_t scratch_bytes = rounded_up(skinny_warps * row_scratch(static_cast<int>(groups)) * 4, 16);
    return launch(int4_row_kernel<words, RawTokens<T>>, skinny_grid(e.n, skinny_warps, row_blocks), skinny_threads,
                  row_ring_bytes + scratch_bytes + shared_tokens_bytes(1, k), stream, raw, packed, k, e);
}

template <class T>
static cudaError_t int4_row(const void* x, const float* given_scale, int steps, const void* packed, int64_t k,
                            int group, const Epilogue& e, cudaStream_t stream) {
    const RawTokens<T> raw{static_cast<const T*>(x), given_scale, steps};
    if (group == 32) return int4_row<1>(raw, packed, k, e, stream);
    if (group == 64) return int4_row<2>(raw, packed, k, e, stream);
    return int4_row<4>(raw, packed, k, e, stream);
}

static bool is_group(int group) { return group == 32 || group == 64 || group == 128; }

}  // namespace ds_compress::linear

extern "C" cudaError_t dsc_int4_linear(const int8_t* quantized, const float* input_scale, const void* packed,
                                       const float* bias, void* out, int out_dtype, int activation, int64_t m,
                                       int64_t n, int64_t k, int group, cudaStream_t stream) {
    using namespace ds_compress::linear;
    const Epilogue e{input_scale, nullptr, bias, out, out_dtype, activation, m, n};
    if (!is_group(group)) return cudaErrorInvalidValue;
    if (m == 0) return cudaSuccess;
    if (m <= most_few_rows(group)) {
        if (group == 32) return int4_few<1>(quantized, packed, k, e, stream);
        if (group == 64) return int4_few<2>(quantized, packed, k, e, stream);
        return int4_few<4>(quantized, packed, k, e, stream);
    }
    if (m <= 64) return int4_gemm<Int4Tile<64, 64, 2, 2, 4>>(quantized, packed, k, group, e, stream);
    return int4_gemm<Int4Tile<128, 64, 2, 4, 2>>(quantized, packed, k, group, e, stream);
}

extern "C" cudaError_t dsc_int4_linear_of(const void* x, int dtype, const float* given_scale, int steps,
                                          const void* packed, const float* bias, void* out, int out_dtype,
                                          int activation, int64_t m, int64_t n, int64_t k, int group,
                                          cudaStream_t stream) {
    using namespace ds_compress::linear;
    const Epilogue e{nullptr, nullptr, bias, out, out_dtype, activation, m, n};
    if (!is_group(group) || !quantizes_itself(m, k) || (steps != 127 && steps != 128)) return cudaErrorInvalidValue;
    return ds_compress::with_dtype(
        dtype, [&](auto t) { return int4_row<decltype(t)>(x, given_scale, steps, packed, k, group, e, stream); });
}
