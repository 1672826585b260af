#include "../dtypes.cuh"
#include "fake_quantize_launch.cuh"
#include "launchers.h"
#include "quant_range.cuh"

namespace ds_compress::elementwise {

template <class T>
static cudaError_t fake_quantize(const void* x, void* y, int64_t rows, int64_t columns, bool given, float* scale,
                                 float* offset, QuantRange quant, uint8_t* mask, cudaStream_t stream) {
    const T* const from = static_cast<const T*>(x);
    T* const to = static_cast<T*>(y);
    const math::Divisor steps = math::divisor_of(quant.steps);
    if (offset == nullptr)
        return FakeQuantize<T, Integers<true>>{from, to, rows, columns, scale, offset, {quant, steps}, stream}.run(
            given, mask);
    return FakeQuantize<T, Integers<false>>{from, to, rows, columns, scale, offset, {quant, steps}, stream}.run(given,
                                                                                                                mask);
}

}  // namespace ds_compress::elementwise

extern "C" cudaError_t dsc_fake_quantize(const void* x, void* y, int dtype, int64_t rows, int64_t columns, int given,
                                         int64_t ranges, float* scale, float* offset, int quant_min, int quant_max,
                                         int steps, uint8_t* mask, cudaStream_t stream) {
    using namespace ds_compress;
    using namespace ds_compress::elementwise;
    if (rows < 0 || rows > INT32_MAX || columns < 0) return cudaErrorInvalidValue;
    if (ranges == 1) {  // one range for all: one row
        columns *= rows;
        rows = 1;
    }
    const QuantRange quant = {static_cast<float>(quant_min), static_cast<float>(quant_max), static_cast<float>(steps)};
    return with_dtype(dtype, [&](auto t) {
        return fake_quantize<decltype(t)>(x, y, rows, columns, given != 0, scale, offset, quant, mask, stream);
    });
}
