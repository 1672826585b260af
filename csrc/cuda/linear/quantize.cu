#include "quantize.cuh"

#include "../dtypes.cuh"
#include "packed.cuh"

namespace ds_compress::linear {

template <class T>
static cudaError_t quantize_rows(const void* x, const float* given_scale, int64_t rows, int64_t columns, int steps,
                                 int8_t* quantized, float* scales, cudaStream_t stream) {
    const T* const from = static_cast<const T*>(x);
    const int64_t padded = int8_row_bytes(columns);
    // A block per row where rows are long, or too few for a warp each to be enough for the device.
    if (columns > 2048 || (columns > 256 && rows < 16 * multiprocessors())) {
        return launch(quantize_rows_kernel<T, quantize_threads>, dim3(static_cast<unsigned>(rows)), quantize_threads, 0,
                      stream, from, given_scale, rows, columns, padded, steps, quantized, scales);
    }
    const int64_t blocks = rounded_up(rows, quantize_threads / 32) / (quantize_threads / 32);
    return launch(quantize_rows_kernel<T, 32>, dim3(static_cast<unsigned>(blocks)), quantize_threads, 0, stream, from,
                  given_scale, rows, columns, padded, steps, quantized, scales);
}

}  // namespace ds_compress::linear

extern "C" cudaError_t dsc_quantize_rows(const void* x, int dtype, const float* given_scale, int64_t rows,
                                         int64_t columns, int steps, int8_t* quantized, float* scales,
                                         cudaStream_t stream) {
    using namespace ds_compress::linear;
    if (rows < 0 || rows > INT32_MAX || columns < 0 || (steps != 127 && steps != 128)) return cudaErrorInvalidValue;
    return ds_compress::with_dtype(dtype, [&](auto t) {
        return quantize_rows<decltype(t)>(x, given_scale, rows, columns, steps, quantized, scales, stream);
    });
}
