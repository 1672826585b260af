#include "../dtypes.cuh"
#include "grouped_gemm.cuh"

namespace ds_compress::linear {

template <class Tile>
static dim3 grouped_grid(const Experts& experts, int64_t n) {
    return dim3(static_cast<unsigned>(places_of<Tile::tile_m>(experts.rows, experts.count)),
                static_cast<unsigned>((n + Tile::tile_n - 1) / Tile::tile_n));
}

template <class Tile>
static cudaError_t int8_grouped(const int8_t* quantized, const ExpertWeights& weights, int64_t k,
                                const Experts& experts, const Epilogue& e, cudaStream_t stream) {
    return launch(int8_grouped_kernel<Tile>, grouped_grid<Tile>(experts, e.n), Tile::threads, Tile::shared_bytes,
                  stream, quantized, weights, k, experts, e);
}

template <class Tile>
static cudaError_t int4_grouped(const int8_t* quantized, const ExpertWeights& weights, int64_t k, int group,
                                const Experts& experts, const Epilogue& e, cudaStream_t stream) {
    return launch(int4_grouped_kernel<Tile>, grouped_grid<Tile>(experts, e.n), Tile::threads, Tile::shared_bytes,
                  stream, quantized, weights, k, group, experts, e);
}

/// The host knows no expert's rows, so tiles are chosen for their mean.
static bool has_few(const Experts& experts) { return experts.rows <= 24 * static_cast<int64_t>(experts.count); }
static bool has_some(const Experts& experts) { return experts.rows <= 96 * static_cast<int64_t>(experts.count); }

template <class T>
static cudaError_t quantize_expert_rows(const void* x, const float* given_scales, const Experts& experts,
                                        int64_t columns, int steps, int8_t* quantized, float* scales,
                                        cudaStream_t stream) {
    const T* const from = static_cast<const T*>(x);
    const int64_t padded = int8_row_bytes(columns);
    // As quantize_rows.
    if (columns > 2048 || (columns > 256 && experts.rows < 16 * multiprocessors())) {
        return launch(quantize_expert_rows_kernel<T, quantize_threads>, dim3(static_cast<unsigned>(experts.rows)),
                      quantize_threads, 0, stream, from, given_scales, experts, columns, padded, steps, quantized,
                      scales);
    }
    const int64_t blocks = rounded_up(experts.rows, quantize_threads / 32) / (quantize_threads / 32);
    return launch(quantize_expert_rows_kernel<T, 32>, dim3(static_cast<unsigned>(blocks)), quantize_threads, 0, stream,
                  from, given_scales, experts, columns, padded, steps, quantized, scales);
}

static bool are_counts(int64_t experts, int64_t rows) {
    return experts > 0 && experts < INT32_MAX && rows >= 0 && rows <= INT32_MAX;
}

}  // namespace ds_compress::linear

extern "C" cudaError_t dsc_quantize_expert_rows(const void* x, int dtype, const float* given_scales,
                                                const void* offsets, int wide, int64_t experts, int64_t rows,
                                                int64_t columns, int steps, int8_t* quantized, float* scales,
                                                cudaStream_t stream) {
    using namespace ds_compress::linear;
    if (!are_counts(experts, rows) || columns < 0 || (steps != 127 && steps != 128)) return cudaErrorInvalidValue;
    const Experts of{offsets, wide, static_cast<int>(experts), rows};
    return ds_compress::with_dtype(dtype, [&](auto t) {
        return quantize_expert_rows<decltype(t)>(x, given_scales, of, columns, steps, quantized, scales, stream);
    });
}

extern "C" cudaError_t dsc_int8_grouped_linear(const int8_t* quantized, const float* input_scale, const void* packed,
                                               int64_t expert_bytes, const float* weight_scale, const float* bias,
                                               const void* offsets, int wide, int64_t experts, void* out, int out_dtype,
                                               int64_t m, int64_t n, int64_t k, cudaStream_t stream) {
    using namespace ds_compress::linear;
    if (!are_counts(experts, m) || expert_bytes % 16 != 0) return cudaErrorInvalidValue;
    const Experts of{offsets, wide, static_cast<int>(experts), m};
    const Epilogue e{input_scale, weight_scale, bias, out, out_dtype, dsc_none, m, n};
    const ExpertWeights weights{static_cast<const int8_t*>(packed), expert_bytes};
    if (has_few(of)) return int8_grouped<Int8Tile<16, 128, 1, 4, 4>>(quantized, weights, k, of, e, stream);
    if (has_some(of)) return int8_grouped<Int8Tile<64, 64, 2, 2, 4>>(quantized, weights, k, of, e, stream);
    return int8_grouped<Int8Tile<128, 128, 2, 4, 2>>(quantized, weights, k, of, e, stream);
}

extern "C" cudaError_t dsc_int4_grouped_linear(const int8_t* quantized, const float* input_scale, const void* packed,
                                               int64_t expert_bytes, const float* bias, const void* offsets, int wide,
                                               int64_t experts, void* out, int out_dtype, int64_t m, int64_t n,
                                               int64_t k, int group, cudaStream_t stream) {
    using namespace ds_compress::linear;
    if (!are_counts(experts, m) || expert_bytes % 16 != 0) return cudaErrorInvalidValue;
    if (group != 32 && group != 64 && group != 128) return cudaErrorInvalidValue;
    const Experts of{offsets, wide, static_cast<int>(experts), m};
    const Epilogue e{input_scale, nullptr, bias, out, out_dtype, dsc_none, m, n};
    const ExpertWeights weights{static_cast<const int8_t*>(packed), expert_bytes};
    if (has_few(of)) return int4_grouped<Int4Tile<16, 128, 1, 4, 4>>(quantized, weights, k, group, of, e, stream);
    if (has_some(of)) return int4_grouped<Int4Tile<64, 64, 2, 2, 4>>(quantized, weights, k, group, of, e, stream);
    return int4_grouped<Int4Tile<128, 64, 2, 4, 2>>(quantized, weights, k, group, of, e, stream);
}
