#include "block_quantize.cuh"

#include "../dtypes.cuh"
#include "launchers.h"

namespace ds_compress::elementwise {

constexpr int blocks_per_multiprocessor = 64;

template <int sharing_, int depth_>
struct Shape {
    static constexpr int sharing = sharing_, depth = depth_;
};

static Format format_of(int64_t numel, int bits, int block) {
    return {block, block * bits / 8, (numel + block - 1) / block, numel / block};
}

/// Blocks of a grid: x over the blocks of a payload, y over payloads.
static dim3 grid_of(int64_t blocks, int sharing, int64_t payloads) {
    dim3 grid = blocks_for(blocks, block_threads / sharing, blocks_per_multiprocessor);
    grid.y = static_cast<unsigned>(payloads < 65535 ? payloads : 65535);
    return grid;
}

/// Calls run(shape) with how many lanes hold a block in how many vectors each, 16 values a lane or 32; depth 0: in no
/// registers.
template <int width, class Run>
static cudaError_t by_length(int block, const Run& run) {
    constexpr int depth = 16 / width;
    switch (block) {
        case 128:
            return run(Shape<8, depth>());
        case 256:
            return run(Shape<16, depth>());
        case 512:
            return run(Shape<32, depth>());
        case 1024:
            return run(Shape<32, 32 / width>());
        default:
            return run(Shape<32, 0>());
    }
}

template <class T, int bits, bool has_residual>
static cudaError_t quantize(const void* x, int64_t numel, float* residual, uint8_t* payloads, int64_t payload_count,
                            int64_t chunk, const Format& format, cudaStream_t stream) {
    return by_length<Vector<T>::count>(format.block, [&](auto shape) {
        return launch(block_quantize_kernel<T, bits, has_residual, shape.sharing, shape.depth>,
                      grid_of(format.blocks, shape.sharing, payload_count), block_threads, 0, stream,
                      static_cast<const T*>(x), numel, residual, payloads, payload_count, chunk, format);
    });
}

template <class T>
static cudaError_t quantize(const void* x, int64_t numel, float* residual, uint8_t* payloads, int64_t payload_count,
                            int64_t chunk, int bits, int block, cudaStream_t stream) {
    const Format format = format_of(chunk, bits, block);
    const auto run = bits == 8 ? (residual != nullptr ? quantize<T, 8, true> : quantize<T, 8, false>)
                               : (residual != nullptr ? quantize<T, 4, true> : quantize<T, 4, false>);
    return run(x, numel, residual, payloads, payload_count, chunk, format, stream);
}

template <class T, int bits>
static cudaError_t dequantize(const uint8_t* payloads, int64_t payload_count, int64_t chunk, const Format& format,
                              void* out, int64_t numel, cudaStream_t stream) {
    return by_length<Vector<T>::count>(format.block, [&](auto shape) {
        return launch(block_dequantize_kernel<T, bits, shape.sharing, shape.depth>,
                      grid_of(format.blocks, shape.sharing, payload_count), block_threads, 0, stream, payloads,
                      payload_count, chunk, format, static_cast<T*>(out), numel);
    });
}

template <class T>
static cudaError_t dequantize(const uint8_t* payloads, int64_t payload_count, int64_t chunk, int bits, int block,
                              void* out, int64_t numel, cudaStream_t stream) {
    const Format format = format_of(chunk, bits, block);
    const auto run = bits == 8 ? dequantize<T, 8> : dequantize<T, 4>;
    return run(payloads, payload_count, chunk, format, out, numel, stream);
}

template <int bits>
static cudaError_t reduce(const Sum<bits>& sum, float* out, cudaStream_t stream) {
    return by_length<Sum<bits>::width>(sum.format.block, [&](auto shape) {
        return launch(block_reduce_kernel<bits, shape.sharing, shape.depth>,
                      grid_of(sum.format.blocks, shape.sharing, 1), block_threads, 0, stream, sum, out);
    });
}

template <int bits>
static cudaError_t reduce_quantize(const Sum<bits>& sum, float* residual, uint8_t* payload, cudaStream_t stream) {
    return by_length<Sum<bits>::width>(sum.format.block, [&](auto shape) {
        const auto kernel = residual != nullptr ? block_reduce_quantize_kernel<bits, true, shape.sharing, shape.depth>
                                                : block_reduce_quantize_kernel<bits, false, shape.sharing, shape.depth>;
        return launch(kernel, grid_of(sum.format.blocks, shape.sharing, 1), block_threads, 0, stream, sum, residual,
                      payload);
    });
}

static bool is_valid(int bits, int block) {
    return (bits == 8 || bits == 4) && block % 32 == 0 && block >= 32 && block <= 8192;
}

}  // namespace ds_compress::elementwise

using namespace ds_compress;
using namespace ds_compress::elementwise;

extern "C" cudaError_t dsc_block_quantize(const void* x, int dtype, int64_t numel, float* residual, uint8_t* payloads,
                                          int64_t payload_count, int64_t chunk, int bits, int block,
                                          cudaStream_t stream) {
    if (!is_valid(bits, block)) return cudaErrorInvalidValue;
    return with_dtype(dtype, [&](auto t) {
        return quantize<decltype(t)>(x, numel, residual, payloads, payload_count, chunk, bits, block, stream);
    });
}

extern "C" cudaError_t dsc_block_dequantize(const uint8_t* payloads, int64_t payload_count, int64_t chunk, int bits,
                                            int block, void* out, int dtype, int64_t numel, cudaStream_t stream) {
    if (!is_valid(bits, block)) return cudaErrorInvalidValue;
    return with_dtype(dtype, [&](auto t) {
        return dequantize<decltype(t)>(payloads, payload_count, chunk, bits, block, out, numel, stream);
    });
}

extern "C" cudaError_t dsc_block_reduce(const uint8_t* payloads, int64_t payload_count, int64_t numel, int bits,
                                        int block, float multiplier, float* out, cudaStream_t stream) {
    if (!is_valid(bits, block) || payload_count < 1 || payload_count > INT32_MAX) return cudaErrorInvalidValue;
    const Format format = format_of(numel, bits, block);
    if (bits == 8)
        return reduce(Sum<8>{payloads, static_cast<int>(payload_count), numel, format, multiplier}, out, stream);
    return reduce(Sum<4>{payloads, static_cast<int>(payload_count), numel, format, multiplier}, out, stream);
}

extern "C" cudaError_t dsc_block_reduce_quantize(const uint8_t* payloads, int64_t payload_count, int64_t numel,
                                                 int bits, int block, float multiplier, float* residual,
                                                 uint8_t* payload, cudaStream_t stream) {
    if (!is_valid(bits, block) || payload_count < 1 || payload_count > INT32_MAX) return cudaErrorInvalidValue;
    const Format format = format_of(numel, bits, block);
    if (bits == 8)
        return reduce_quantize(Sum<8>{payloads, static_cast<int>(payload_count), numel, format, multiplier}, residual,
                               payload, stream);
    return reduce_quantize(Sum<4>{payloads, static_cast<int>(payload_count), numel, format, multiplier}, residual,
                           payload, stream);
}
