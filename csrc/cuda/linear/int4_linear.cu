#include "int4_gemm.cuh"
#include "int4_skinny.cuh"

namespace ds_compress::linear {

template <class Tile>
static cudaError_t int4_gemm(const int8_t* codes, const void* packed, int64_t k, int group, const Epilogue& e,
                             cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((e.m + Tile::tile_m - 1) / Tile::tile_m),
                    static_cast<unsigned>((e.n + Tile::tile_n - 1) / Tile::tile_n));
    return launch(int4_gemm_kernel<Tile>, grid, Tile::threads, Tile::shared_bytes, stream, codes, packed, k, group, e);
}

template <int token_tiles, int words, int stages, class Given>
static cudaError_t int4_skinny(const Given& given, const void* packed, int64_t k, const Epilogue& e, dim3 grid,
                               size_t own_bytes, cudaStream_t stream) {
    using Tile = Int4Skinny<token_tiles, words, stages>;
    return launch(int4_skinny_kernel<Tile, Given>, grid, skinny_threads, Tile::ring_bytes + Tile::part_bytes + own_bytes,
                  stream, given, packed, k, e);
}

template <int token_tiles, int stages, class Given>
static cudaError_t int4_skinny(const Given& given, const void* packed, int64_t k, int group, const Epilogue& e, dim3 grid,
                               size_t own_bytes, cudaStream_t stream) {
    if (group == 32) return int4_skinny<token_tiles, 1, stages>(given, packed, k, e, grid, own_bytes, stream);
    if (group == 64) return int4_skinny<token_tiles, 2, stages>(given, packed, k, e, grid, own_bytes, stream);
    return int4_skinny<token_tiles, 4, stages>(given, packed, k, e, grid, own_bytes, stream);
}

/// As int8_skinny.
template <int token_tiles, int stages>
static cudaError_t int4_skinny_codes(const int8_t* codes, const void* packed, int64_t k, int group, const Epilogue& e,
                                     cudaStream_t stream) {
    const Tokens tokens{codes, int8_row_bytes(k), static_cast<int>(e.m), e.input_scale};
    const dim3 grid(static_cast<unsigned>((e.n + 15) / 16));
    return int4_skinny<token_tiles, stages>(tokens, packed, k, group, e, grid, 0, stream);
}

template <class T>
static cudaError_t int4_skinny_of(const void* x, const float* given_scale, int steps, const void* packed, int64_t k,
                                  int group, const Epilogue& e, cudaStream_t stream) {
    const RawTokens<T> raw{static_cast<const T*>(x), given_scale, steps};
    return int4_skinny<1, 4>(raw, packed, k, group, e, skinny_grid(e.n), own_tokens_bytes(e.m, k), stream);
}

static bool is_group(int group) { return group == 32 || group == 64 || group == 128; }

}  // namespace ds_compress::linear

extern "C" cudaError_t dsc_int4_linear(const int8_t* codes, const float* input_scale, const void* packed,
                                       const float* bias, void* out, int out_dtype, int activation, int64_t m,
                                       int64_t n, int64_t k, int group, cudaStream_t stream) {
    using namespace ds_compress::linear;
    const Epilogue e{input_scale, nullptr, bias, out, out_dtype, activation, m, n};
    if (!is_group(group)) return cudaErrorInvalidValue;
    if (m == 0) return cudaSuccess;
    if (m <= 8) return int4_skinny_codes<1, 4>(codes, packed, k, group, e, stream);
    if (m <= 16) return int4_skinny_codes<2, 4>(codes, packed, k, group, e, stream);
    if (m <= 32) return int4_skinny_codes<4, 4>(codes, packed, k, group, e, stream);
    if (m <= 64) return int4_gemm<Int4Tile<64, 64, 2, 2, 4>>(codes, packed, k, group, e, stream);
    return int4_gemm<Int4Tile<128, 64, 2, 4, 2>>(codes, packed, k, group, e, stream);
}

extern "C" cudaError_t dsc_int4_linear_of(const void* x, int dtype, const float* given_scale, int steps,
                                          const void* packed, const float* bias, void* out, int out_dtype,
                                          int activation, int64_t m, int64_t n, int64_t k, int group,
                                          cudaStream_t stream) {
    using namespace ds_compress::linear;
    const Epilogue e{nullptr, nullptr, bias, out, out_dtype, activation, m, n};
    if (!is_group(group) || !quantizes_itself(m, k) || (steps != 127 && steps != 128)) return cudaErrorInvalidValue;
    switch (dtype) {
        case dsc_float32:
            return int4_skinny_of<float>(x, given_scale, steps, packed, k, group, e, stream);
        case dsc_bfloat16:
            return int4_skinny_of<__nv_bfloat16>(x, given_scale, steps, packed, k, group, e, stream);
        case dsc_float16:
            return int4_skinny_of<__half>(x, given_scale, steps, packed, k, group, e, stream);
        default:
            return cudaErrorInvalidValue;
    }
}
