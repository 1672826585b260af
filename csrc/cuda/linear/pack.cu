#include "pack.cuh"

#include "../dtypes.cuh"

namespace ds_compress::linear {

/// Enough blocks for `threads` threads, and one for the header where there is nothing else.
static dim3 pack_grid(int64_t threads) {
    return dim3(static_cast<unsigned>(threads > 0 ? (threads + pack_threads - 1) / pack_threads : 1));
}

template <class T>
static cudaError_t quantize_pack(const void* weight, const float* scale, bool one_scale, Shape shape, int steps,
                                 void* packed, cudaStream_t stream) {
    return launch(int8_quantize_pack_kernel<T>, pack_grid(shape.n * int8_row_bytes(shape.k) / 16), pack_threads, 0,
                  stream, static_cast<const T*>(weight), scale, one_scale, steps, shape, packed);
}

}  // namespace ds_compress::linear

using namespace ds_compress::linear;

extern "C" cudaError_t dsc_int8_pack(const int8_t* quantized, int64_t n, int64_t k, void* packed, cudaStream_t stream) {
    const Shape shape{n, k, 0};
    return ds_compress::launch(int8_pack_kernel, pack_grid(n * int8_row_bytes(k) / 16), pack_threads, 0, stream,
                               quantized, shape, packed);
}

extern "C" cudaError_t dsc_int8_quantize_pack(const void* weight, int dtype, const float* scale, int one_scale,
                                              int64_t n, int64_t k, int steps, void* packed, cudaStream_t stream) {
    const Shape shape{n, k, 0};
    if (steps != 127 && steps != 128) return cudaErrorInvalidValue;
    return ds_compress::with_dtype(dtype, [&](auto t) {
        return quantize_pack<decltype(t)>(weight, scale, one_scale != 0, shape, steps, packed, stream);
    });
}

extern "C" cudaError_t dsc_int4_pack(const int8_t* quantized, const float* scale, int64_t n, int64_t k, int group,
                                     void* packed, cudaStream_t stream) {
    const Shape shape{n, k, group};
    if (group != 32 && group != 64 && group != 128) return cudaErrorInvalidValue;
    return ds_compress::launch(int4_pack_kernel, pack_grid(n * int4_row_bytes(k) / 16), pack_threads, 0, stream,
                               quantized, scale, shape, packed);
}
