// Packing of weights, once, at load time (int8_quantize: at every step of quantization-aware training). A thread
// makes 16 bytes of the packed form; the first one writes the header too.
#pragma once

#include "ds_compress/device.h"
#include "packed.cuh"
#include "quantize.cuh"

namespace ds_compress::linear {

constexpr int pack_threads = 256;

struct Shape {
    int64_t n, k, group;  // group: columns that share a scale (int4), else 0
};

DSC_DEVICE int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

DSC_DEVICE void write_header(void* packed, CudaLayout layout, Shape shape) {
    const int64_t groups = shape.group > 0 ? (shape.k + shape.group - 1) / shape.group : 0;
    *static_cast<PackedHeader*>(packed) = {kPackedMagic, layout, shape.n, shape.k, groups, {0, 0, 0}};
}

DSC_DEVICE void store_16(void* to, const unsigned (&words)[4]) {
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

/// The quantized value at (row, column) as a byte, 0 beyond the last column.
DSC_DEVICE unsigned quantized_at(const int8_t* quantized, Shape shape, int64_t row, int64_t column) {
    return column < shape.k ? static_cast<uint8_t>(quantized[row * shape.k + column]) : 0u;
}

/// quantized (n, k).
__global__ void __launch_bounds__(pack_threads) int8_pack_kernel(const int8_t* quantized, Shape shape, void* packed) {
    const int64_t pitch = int8_row_bytes(shape.k), byte = global_thread() * 16;
    if (byte == 0) write_header(packed, kLayoutCudaInt8, shape);
    if (byte >= shape.n * pitch) return;
    unsigned words[4] = {};
    for (int i = 0; i < 16; i++)
        words[i / 4] |= quantized_at(quantized, shape, byte / pitch, byte % pitch + i) << i % 4 * 8;
    store_16(static_cast<int8_t*>(packed) + header_bytes + byte, words);
}

/// weight (n, k), scale (n,) or one for all. A row whose scale is NaN has quantized values 0.
template <class T>
__global__ void __launch_bounds__(pack_threads)
    int8_quantize_pack_kernel(const T* weight, const float* scale, bool one_scale, int steps, Shape shape,
                              void* packed) {
    const int64_t pitch = int8_row_bytes(shape.k), byte = global_thread() * 16;
    if (byte == 0) write_header(packed, kLayoutCudaInt8, shape);
    if (byte >= shape.n * pitch) return;
    const int64_t row = byte / pitch;
    const bool whole = shape.k % chunk == 0 && reinterpret_cast<uintptr_t>(weight) % 16 == 0;
    float values[chunk];
    load_chunk(values, weight + row * shape.k, byte % pitch, shape.k, whole);
    const float row_scale = scale[one_scale ? 0 : row], low = static_cast<float>(-steps);
    const math::Divisor divisor = math::divisor_of(row_scale);
    unsigned words[4] = {};
#pragma unroll
    for (int i = 0; i < chunk; i++) {
        const float quotient = math::any_quotient(values[i], divisor);
        const float q = math::clamp(math::round_half_even(quotient), low, 127.0f);
        words[i / 4] |= (q == q ? static_cast<unsigned>(static_cast<int>(q)) & 255u : 0u) << i % 4 * 8;
    }
    store_16(static_cast<int8_t*>(packed) + header_bytes + byte, words);
}

/// quantized (n, k) in [-8, 7], scale (n, groups).
__global__ void __launch_bounds__(pack_threads)
    int4_pack_kernel(const int8_t* quantized, const float* scale, Shape shape, void* packed) {
    const int64_t pitch = int4_row_bytes(shape.k), thread = global_thread();
    if (thread == 0) write_header(packed, kLayoutCudaInt4, shape);
    int8_t* const body = static_cast<int8_t*>(packed) + header_bytes;
    if (thread * 16 < shape.n * pitch) {
        const int64_t row = thread * 16 / pitch, column = thread * 16 % pitch * 2;
        unsigned words[4] = {};
        for (int i = 0; i < 16; i++) {
            const unsigned low = quantized_at(quantized, shape, row, column + i) & 15u;
            const unsigned high = quantized_at(quantized, shape, row, column + 16 + i) & 15u;
            words[i / 4] |= (low | high << 4) << i % 4 * 8;
        }
        store_16(body + thread * 16, words);
    }
    const int64_t groups = (shape.k + shape.group - 1) / shape.group, stride = int4_scale_stride(shape.n);
    float* const scales = reinterpret_cast<float*>(body + shape.n * pitch);
    for (int64_t i = thread; i < groups * stride; i += static_cast<int64_t>(gridDim.x) * pack_threads) {
        const int64_t group = i / stride, row = i % stride;
        scales[i] = row < shape.n ? scale[row * groups + group] : 0.0f;
    }
}

}  // namespace ds_compress::linear
