#include "int8_gemm.cuh"
#include "int8_skinny.cuh"

namespace ds_compress::linear {

template <class Tile>
static cudaError_t int8_gemm(const int8_t* codes, const void* packed, int64_t k, const Epilogue& e,
                             cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((e.m + Tile::tile_m - 1) / Tile::tile_m),
                    static_cast<unsigned>((e.n + Tile::tile_n - 1) / Tile::tile_n));
    return launch(int8_gemm_kernel<Tile>, grid, Tile::threads, Tile::shared_bytes, stream, codes, packed, k, e);
}

/// A block per tile of features, and more blocks than fit at once: while one ends, its neighbours load.
template <int token_tiles, int feature_tiles, int stages>
static cudaError_t int8_skinny(const int8_t* codes, const void* packed, int64_t k, const Epilogue& e,
                               cudaStream_t stream) {
    using Tile = Int8Skinny<token_tiles, feature_tiles, stages>;
    const Tokens tokens{codes, int8_row_bytes(k), static_cast<int>(e.m), e.input_scale};
    const dim3 grid(static_cast<unsigned>((e.n + Tile::features - 1) / Tile::features));
    return launch(int8_skinny_kernel<Tile, Tokens>, grid, skinny_threads, Tile::template ring_bytes<false>, stream, tokens, packed,
                  k, e);
}

/// As many blocks as fit at once, since each of them quantizes x.
template <class T>
static cudaError_t int8_skinny_of(const void* x, const float* given_scale, int steps, const void* packed, int64_t k,
                                  const Epilogue& e, cudaStream_t stream) {
    using Tile = Int8Skinny<1, 1, 5>;
    const RawTokens<T> raw{static_cast<const T*>(x), given_scale, steps};
    return launch(int8_skinny_kernel<Tile, RawTokens<T>>, skinny_grid(e.n), skinny_threads,
                  Tile::template ring_bytes<true> + own_tokens_bytes(e.m, k), stream, raw, packed, k, e);
}

}  // namespace ds_compress::linear

extern "C" cudaError_t dsc_int8_linear(const int8_t* codes, const float* input_scale, const void* packed,
                                       const float* weight_scale, const float* bias, void* out, int out_dtype,
                                       int activation, int64_t m, int64_t n, int64_t k, cudaStream_t stream) {
    using namespace ds_compress::linear;
    const Epilogue e{input_scale, weight_scale, bias, out, out_dtype, activation, m, n};
    if (m == 0) return cudaSuccess;
    if (m <= 8) return int8_skinny<1, 1, 5>(codes, packed, k, e, stream);
    if (m <= 16) return int8_skinny<2, 1, 4>(codes, packed, k, e, stream);
    if (m <= 32) return int8_skinny<4, 1, 4>(codes, packed, k, e, stream);
    if (m <= 64) return int8_gemm<Int8Tile<64, 64, 2, 2, 4>>(codes, packed, k, e, stream);
    return int8_gemm<Int8Tile<128, 128, 2, 4, 2>>(codes, packed, k, e, stream);
}

extern "C" cudaError_t dsc_int8_linear_of(const void* x, int dtype, const float* given_scale, int steps,
                                          const void* packed, const float* weight_scale, const float* bias, void* out,
                                          int out_dtype, int activation, int64_t m, int64_t n, int64_t k,
                                          cudaStream_t stream) {
    using namespace ds_compress::linear;
    const Epilogue e{nullptr, weight_scale, bias, out, out_dtype, activation, m, n};
    if (!quantizes_itself(m, k) || (steps != 127 && steps != 128)) return cudaErrorInvalidValue;
    switch (dtype) {
        case dsc_float32:
            return int8_skinny_of<float>(x, given_scale, steps, packed, k, e, stream);
        case dsc_bfloat16:
            return int8_skinny_of<__nv_bfloat16>(x, given_scale, steps, packed, k, e, stream);
        case dsc_float16:
            return int8_skinny_of<__half>(x, given_scale, steps, packed, k, e, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

extern "C" int dsc_quantizes_itself(int64_t m, int64_t k) { return ds_compress::linear::quantizes_itself(m, k); }
