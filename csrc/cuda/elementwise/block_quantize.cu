#include "block_quantize.cuh"

#include "launchers.h"

namespace ds_compress::elementwise {

static Format format_of(int64_t numel, int bits, int block) {
    return {block, (numel + block - 1) / block, block * bits / 8};
}

template <class T>
static cudaError_t quantize(const void* x, int64_t numel, float* residual, uint8_t* messages, int64_t message_count,
                            int64_t chunk, int bits, int block, cudaStream_t stream) {
    const Format format = format_of(chunk, bits, block);
    const auto kernel = bits == 8 ? block_quantize_kernel<T, 8> : block_quantize_kernel<T, 4>;
    return launch(kernel, blocks_for(message_count * format.blocks, warps), threads, 0, stream,
                  static_cast<const T*>(x), numel, residual, messages, message_count, chunk, format);
}

template <class T>
static cudaError_t dequantize(const uint8_t* messages, int64_t message_count, int64_t chunk, int bits, int block,
                              void* out, int64_t numel, cudaStream_t stream) {
    const Format format = format_of(chunk, bits, block);
    const auto kernel = bits == 8 ? block_dequantize_kernel<T, 8> : block_dequantize_kernel<T, 4>;
    return launch(kernel, blocks_for(message_count * format.blocks, warps), threads, 0, stream, messages,
                  message_count, chunk, format, static_cast<T*>(out), numel);
}

static bool is_valid(int bits, int block) {
    return (bits == 8 || bits == 4) && block % 32 == 0 && block >= 32 && block <= 8192;
}

}  // namespace ds_compress::elementwise

using namespace ds_compress;
using namespace ds_compress::elementwise;

extern "C" cudaError_t dsc_block_quantize(const void* x, int dtype, int64_t numel, float* residual, uint8_t* messages,
                                          int64_t message_count, int64_t chunk, int bits, int block,
                                          cudaStream_t stream) {
    if (!is_valid(bits, block)) return cudaErrorInvalidValue;
    switch (dtype) {
        case dsc_float32:
            return quantize<float>(x, numel, residual, messages, message_count, chunk, bits, block, stream);
        case dsc_bfloat16:
            return quantize<__nv_bfloat16>(x, numel, residual, messages, message_count, chunk, bits, block, stream);
        case dsc_float16:
            return quantize<__half>(x, numel, residual, messages, message_count, chunk, bits, block, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

extern "C" cudaError_t dsc_block_dequantize(const uint8_t* messages, int64_t message_count, int64_t chunk, int bits,
                                            int block, void* out, int dtype, int64_t numel, cudaStream_t stream) {
    if (!is_valid(bits, block)) return cudaErrorInvalidValue;
    switch (dtype) {
        case dsc_float32:
            return dequantize<float>(messages, message_count, chunk, bits, block, out, numel, stream);
        case dsc_bfloat16:
            return dequantize<__nv_bfloat16>(messages, message_count, chunk, bits, block, out, numel, stream);
        case dsc_float16:
            return dequantize<__half>(messages, message_count, chunk, bits, block, out, numel, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

extern "C" cudaError_t dsc_block_reduce(const uint8_t* messages, int64_t message_count, int64_t numel, int bits,
                                        int block, float multiplier, float* out, cudaStream_t stream) {
    if (!is_valid(bits, block) || message_count < 1) return cudaErrorInvalidValue;
    const Format format = format_of(numel, bits, block);
    const dim3 grid = blocks_for((numel + quad - 1) / quad);
    if (bits == 8)
        return launch(block_reduce_kernel<8>, grid, threads, 0, stream,
                      Sum<8>{messages, message_count, numel, format, multiplier}, out);
    return launch(block_reduce_kernel<4>, grid, threads, 0, stream,
                  Sum<4>{messages, message_count, numel, format, multiplier}, out);
}

extern "C" cudaError_t dsc_block_reduce_quantize(const uint8_t* messages, int64_t message_count, int64_t numel,
                                                 int bits, int block, float multiplier, float* residual,
                                                 uint8_t* message, cudaStream_t stream) {
    if (!is_valid(bits, block) || message_count < 1) return cudaErrorInvalidValue;
    const Format format = format_of(numel, bits, block);
    const dim3 grid = blocks_for(format.blocks, warps);
    if (bits == 8)
        return launch(block_reduce_quantize_kernel<8>, grid, threads, 0, stream,
                      Sum<8>{messages, message_count, numel, format, multiplier}, residual, message);
    return launch(block_reduce_quantize_kernel<4>, grid, threads, 0, stream,
                  Sum<4>{messages, message_count, numel, format, multiplier}, residual, message);
}
