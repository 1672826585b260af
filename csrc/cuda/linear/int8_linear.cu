#include "int8_gemm.cuh"
#include "int8_gemv.cuh"

namespace ds_compress::linear {

template <class Tile>
static cudaError_t int8_gemm(const int8_t* codes, const void* packed, int64_t k, const Epilogue& e,
                             cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((e.m + Tile::tile_m - 1) / Tile::tile_m),
                    static_cast<unsigned>((e.n + Tile::tile_n - 1) / Tile::tile_n));
    return launch(int8_gemm_kernel<Tile>, grid, Tile::threads, Tile::shared_bytes, stream, codes, packed, k, e);
}

template <int rows>
static cudaError_t int8_gemv(const int8_t* codes, const void* packed, int64_t k, const Epilogue& e,
                             cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((e.n + gemv_warps - 1) / gemv_warps));
    return launch(int8_gemv_kernel<rows>, grid, gemv_warps * 32, 0, stream, codes, packed, k, e);
}

}  // namespace ds_compress::linear

extern "C" cudaError_t dsc_int8_linear(const int8_t* codes, const float* input_scale, const void* packed,
                                       const float* weight_scale, const float* bias, void* out, int out_dtype,
                                       int activation, int64_t m, int64_t n, int64_t k, cudaStream_t stream) {
    using namespace ds_compress::linear;
    const Epilogue e{input_scale, weight_scale, bias, out, out_dtype, activation, m, n};
    if (m <= 1) return int8_gemv<1>(codes, packed, k, e, stream);
    if (m <= 2) return int8_gemv<2>(codes, packed, k, e, stream);
    if (m <= 4) return int8_gemv<4>(codes, packed, k, e, stream);
    if (m <= most_gemv_rows) return int8_gemv<most_gemv_rows>(codes, packed, k, e, stream);
    if (m <= 64) return int8_gemm<Int8Tile<64, 64, 2, 2, 4>>(codes, packed, k, e, stream);
    return int8_gemm<Int8Tile<128, 128, 2, 4, 2>>(codes, packed, k, e, stream);
}
