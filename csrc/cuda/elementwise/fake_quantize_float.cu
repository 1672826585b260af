#include "../dtypes.cuh"
#include "fake_quantize_launch.cuh"
#include "launchers.h"
#include "small_floats.cuh"

extern "C" cudaError_t dsc_fake_quantize_float(const void* x, void* y, int dtype, int64_t blocks, int64_t block,
                                               int given, int64_t scales, float* scale, const float* global_scale,
                                               int exponent_bits, int mantissa_bits, float largest, int scale_kind,
                                               uint8_t* mask, cudaStream_t stream) {
    using namespace ds_compress;
    using namespace ds_compress::elementwise;
    if (blocks < 0 || blocks > INT32_MAX || block < 0) return cudaErrorInvalidValue;
    if (scales == 1) {  // one scale for all: one block
        block *= blocks;
        blocks = 1;
    }
    const math::FloatFormat format = math::float_format(exponent_bits, mantissa_bits, largest, scale_kind);
    const SmallFloats floats = {format, global_scale, !given && scale_kind == math::kScaleE8m0};
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const FakeQuantize<T, SmallFloats> call = {
            static_cast<const T*>(x), static_cast<T*>(y), blocks, block, scale, nullptr, floats, stream};
        return call.run(given != 0, mask);
    });
}
