#include "sparse24_gemm.cuh"

namespace ds_compress::linear {

template <class Tile>
static cudaError_t sparse24_gemm(const int8_t* codes, const void* packed, int64_t k, const Epilogue& e,
                                 cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((e.m + Tile::tile_m - 1) / Tile::tile_m),
                    static_cast<unsigned>((e.n + Tile::tile_n - 1) / Tile::tile_n));
    return launch(sparse24_gemm_kernel<Tile>, grid, Tile::threads, Tile::shared_bytes, stream, codes, packed, k, e);
}

}  // namespace ds_compress::linear

extern "C" cudaError_t dsc_sparse24_linear(const int8_t* codes, const float* input_scale, const void* packed,
                                           const float* weight_scale, const float* bias, void* out, int out_dtype,
                                           int activation, int64_t m, int64_t n, int64_t k, cudaStream_t stream) {
    using namespace ds_compress::linear;
    const Epilogue e{input_scale, weight_scale, bias, out, out_dtype, activation, m, n};
    if (k % 4 != 0) return cudaErrorInvalidValue;
    if (m <= 32) return sparse24_gemm<Sparse24Tile<64, 32, 2, 2, 4>>(codes, packed, k, e, stream);
    return sparse24_gemm<Sparse24Tile<128, 128, 2, 4, 2>>(codes, packed, k, e, stream);
}
