#include "../dtypes.cuh"
#include "int8_gemm.cuh"
#include "int8_row.cuh"
#include "int8_skinny.cuh"

namespace ds_compress::linear {

template <class Tile>
static cudaError_t int8_gemm(const int8_t* quantized, const void* packed, int64_t k, const Epilogue& e,
                             cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((e.m + Tile::tile_m - 1) / Tile::tile_m),
                    static_cast<unsigned>((e.n + Tile::tile_n - 1) / Tile::tile_n));
    return launch(int8_gemm_kernel<Tile>, grid, Tile::threads, Tile::shared_bytes, stream, quantized, packed, k, e);
}

template <class Tile, class Given>
static cudaError_t int8_skinny(const Given& given, const void* packed, int64_t k, const Epilogue& e,
                               cudaStream_t stream) {
    const size_t tokens_bytes = Given::shared ? shared_tokens_bytes(e.m, k) : 0;
    return launch(int8_skinny_kernel<Tile, Given>, skinny_grid(e.n, Tile::features, Tile::blocks), skinny_threads,
                  Tile::ring_bytes + tokens_bytes, stream, given, packed, k, e);
}

template <class Tile>
static cudaError_t int8_skinny_of_quantized(const int8_t* quantized, const void* packed, int64_t k, const Epilogue& e,
                                            cudaStream_t stream) {
    if (are_copied(e.m, k, Tile::ring_bytes))
        return int8_skinny<Tile>(CopiedTokens{quantized, e.input_scale}, packed, k, e, stream);
    return int8_skinny<Tile>(GlobalTokens{quantized, e.input_scale}, packed, k, e, stream);
}

template <class T>
static cudaError_t int8_row(const void* x, const float* given_scale, int steps, const void* packed, int64_t k,
                            const Epilogue& e, cudaStream_t stream) {
    const RawTokens<T> raw{static_cast<const T*>(x), given_scale, steps};
    return launch(int8_row_kernel<RawTokens<T>>, skinny_grid(e.n, skinny_warps, row_blocks), skinny_threads,
                  row_ring_bytes + shared_tokens_bytes(1, k), stream, raw, packed, k, e);
}

}  // namespace ds_compress::linear

extern "C" cudaError_t dsc_int8_linear(const int8_t* quantized, const float* input_scale, const void* packed,
                                       const float* weight_scale, const float* bias, void* out, int out_dtype,
                                       int activation, int64_t m, int64_t n, int64_t k, cudaStream_t stream) {
    using namespace ds_compress::linear;
    const Epilogue e{input_scale, weight_scale, bias, out, out_dtype, activation, m, n};
    if (m == 0) return cudaSuccess;
    if (m <= 8) return int8_skinny_of_quantized<Int8Skinny<1, 1, 5, 3>>(quantized, packed, k, e, stream);
    if (m <= 16) return int8_skinny_of_quantized<Int8Skinny<2, 1, 4, 3>>(quantized, packed, k, e, stream);
    if (m <= 32) return int8_skinny_of_quantized<Int8Skinny<4, 2, 3, 2>>(quantized, packed, k, e, stream);
    if (m <= 64) return int8_gemm<Int8Tile<64, 64, 2, 2, 4>>(quantized, packed, k, e, stream);
    return int8_gemm<Int8Tile<128, 128, 2, 4, 2>>(quantized, packed, k, e, stream);
}

extern "C" cudaError_t dsc_int8_linear_of(const void* x, int dtype, const float* given_scale, int steps,
                                          const void* packed, const float* weight_scale, const float* bias, void* out,
                                          int out_dtype, int activation, int64_t m, int64_t n, int64_t k,
                                          cudaStream_t stream) {
    using namespace ds_compress::linear;
    const Epilogue e{nullptr, weight_scale, bias, out, out_dtype, activation, m, n};
    if (!quantizes_itself(m, k) || (steps != 127 && steps != 128)) return cudaErrorInvalidValue;
    return ds_compress::with_dtype(
        dtype, [&](auto t) { return int8_row<decltype(t)>(x, given_scale, steps, packed, k, e, stream); });
}

extern "C" int dsc_quantizes_itself(int64_t m, int64_t k) { return ds_compress::linear::quantizes_itself(m, k); }
