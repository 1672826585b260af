#include "int4_gemm.cuh"
#include "int4_gemv.cuh"

namespace ds_compress::linear {

template <class Tile>
static cudaError_t int4_gemm(const int8_t* codes, const void* packed, int64_t k, int group, const Epilogue& e,
                             cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((e.m + Tile::tile_m - 1) / Tile::tile_m),
                    static_cast<unsigned>((e.n + Tile::tile_n - 1) / Tile::tile_n));
    return launch(int4_gemm_kernel<Tile>, grid, Tile::threads, Tile::shared_bytes, stream, codes, packed, k, group, e);
}

template <int rows>
static cudaError_t int4_gemv(const int8_t* codes, const void* packed, int64_t k, int group, const Epilogue& e,
                             cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((e.n + gemv_warps - 1) / gemv_warps));
    return launch(int4_gemv_kernel<rows>, grid, gemv_warps * 32, 0, stream, codes, packed, k, group, e);
}

}  // namespace ds_compress::linear

extern "C" cudaError_t dsc_int4_linear(const int8_t* codes, const float* input_scale, const void* packed,
                                       const float* bias, void* out, int out_dtype, int activation, int64_t m,
                                       int64_t n, int64_t k, int group, cudaStream_t stream) {
    using namespace ds_compress::linear;
    const Epilogue e{input_scale, nullptr, bias, out, out_dtype, activation, m, n};
    if (group != 32 && group != 64 && group != 128) return cudaErrorInvalidValue;
    if (m <= 1) return int4_gemv<1>(codes, packed, k, group, e, stream);
    if (m <= 4) return int4_gemv<4>(codes, packed, k, group, e, stream);
    if (m <= most_gemv_rows) return int4_gemv<most_gemv_rows>(codes, packed, k, group, e, stream);
    if (m <= 64) return int4_gemm<Int4Tile<64, 64, 2, 2, 4>>(codes, packed, k, group, e, stream);
    return int4_gemm<Int4Tile<128, 64, 2, 4, 2>>(codes, packed, k, group, e, stream);
}
