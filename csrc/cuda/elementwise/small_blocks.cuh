// Fake quantization of blocks of 1, 2, 4, ... 32 vectors, of which neighbouring lanes have one each: all of memory is
// read once, in order, and a block's largest magnitude comes by shuffles.
#pragma once

#include "span.cuh"

namespace ds_compress::elementwise {

/// `sharing`: vectors of a block, a power of two up to 32. mask: null, or for blocks of whole bytes of it.
template <class T, class Quantizer>
__global__ void __launch_bounds__(threads)
    fake_quantize_small_blocks_kernel(const T* __restrict__ x, T* __restrict__ y, unsigned vectors, int sharing,
                                      float* __restrict__ scale, Quantizer quantizer, uint8_t* __restrict__ mask) {
    constexpr int width = Vector<T>::count;
    const unsigned begin = blockIdx.x * (threads * unroll) + threadIdx.x;
    Vector<T> held[unroll] = {};
#pragma unroll
    for (int u = 0; u < unroll; u++)
        if (begin + u * threads < vectors) held[u] = load_vector(x + static_cast<int64_t>(begin + u * threads) * width);
#pragma unroll
    for (int u = 0; u < unroll; u++) {
        const unsigned i = begin + u * threads;
        Span<true> span;
#pragma unroll
        for (int j = 0; j < width; j++) span.add(to_float(held[u].values[j]));
        for (int distance = sharing / 2; distance > 0; distance /= 2)  // all lanes of the warp, with a vector or not
            span = both(span, {math::float_of(__shfl_xor_sync(~0u, math::bits_of(span.largest), distance))});
        const math::ScaleAndOffset range = quantizer.range(span, sharing * width);
        if (i < vectors && i % static_cast<unsigned>(sharing) == 0)
            scale[i / static_cast<unsigned>(sharing)] = range.scale;
        const auto work = quantizer.template working<T>(range);
        const unsigned bits = quantizer.quantize_measured(held[u], work, mask != nullptr);
        if (i < vectors) store_vector(y + static_cast<int64_t>(i) * width, held[u]);
        if (mask != nullptr) store_mask<width>(mask, i, i < vectors, bits);
    }
}

}  // namespace ds_compress::elementwise
