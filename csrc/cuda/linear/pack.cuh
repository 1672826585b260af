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

/// The code at (row, column) as a byte, 0 beyond the last column.
DSC_DEVICE unsigned code_at(const int8_t* codes, Shape shape, int64_t row, int64_t column) {
    return column < shape.k ? static_cast<uint8_t>(codes[row * shape.k + column]) : 0u;
}

/// codes (n, k).
__global__ void __launch_bounds__(pack_threads) int8_pack_kernel(const int8_t* codes, Shape shape, void* packed) {
    const int64_t pitch = int8_row_bytes(shape.k), byte = global_thread() * 16;
    if (byte == 0) write_header(packed, kLayoutCudaInt8, shape);
    if (byte >= shape.n * pitch) return;
    unsigned words[4] = {};
    for (int i = 0; i < 16; i++) words[i / 4] |= code_at(codes, shape, byte / pitch, byte % pitch + i) << i % 4 * 8;
    store_16(static_cast<int8_t*>(packed) + header_bytes + byte, words);
}

/// weight (n, k), scale (n,) or one for all. A row whose scale is NaN has codes 0.
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
        const float code = math::clamp(math::round_half_even(quotient), low, 127.0f);
        words[i / 4] |= (code == code ? static_cast<unsigned>(static_cast<int>(code)) & 255u : 0u) << i % 4 * 8;
    }
    store_16(static_cast<int8_t*>(packed) + header_bytes + byte, words);
}

/// codes (n, k) in [-8, 7], scale (n, groups).
__global__ void __launch_bounds__(pack_threads)
    int4_pack_kernel(const int8_t* codes, const float* scale, Shape shape, void* packed) {
    const int64_t pitch = int4_row_bytes(shape.k), thread = global_thread();
    if (thread == 0) write_header(packed, kLayoutCudaInt4, shape);
    int8_t* const body = static_cast<int8_t*>(packed) + header_bytes;
    if (thread * 16 < shape.n * pitch) {
        const int64_t row = thread * 16 / pitch, column = thread * 16 % pitch * 2;
        unsigned words[4] = {};
        for (int i = 0; i < 16; i++) {
            const unsigned low = code_at(codes, shape, row, column + i) & 15u;
            const unsigned high = code_at(codes, shape, row, column + 16 + i) & 15u;
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

/// The two kept codes of four, and their places: 2 bits each, in increasing order, as mma.sp demands.
struct KeptPair {
    unsigned first, second, places;
    bool valid;
};

DSC_DEVICE KeptPair keep_pair(const unsigned (&four)[4]) {
    int first = -1, second = -1;
    bool valid = true;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (four[i] == 0) continue;
        if (first < 0) first = i;
        else if (second < 0) second = i;
        else valid = false;
    }
    // Fewer than two non-zeros: zeros fill up, the lower place first.
    if (first < 0) first = 0, second = 1;
    if (second < 0 && first == 0) second = 1;
    if (second < 0) second = first, first = 0;
    unsigned kept_first = 0, kept_second = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        kept_first = i == first ? four[i] : kept_first;
        kept_second = i == second ? four[i] : kept_second;
    }
    return {kept_first, kept_second, static_cast<unsigned>(first | second << 2), valid};
}

/// codes (n, k). A thread packs 32 columns of one row: 16 bytes of codes and one word of places.
__global__ void __launch_bounds__(pack_threads)
    sparse24_pack_kernel(const int8_t* codes, Shape shape, void* packed, int* invalid) {
    const int64_t runs = sparse24_row_bytes(shape.k) / 16, thread = global_thread();
    if (thread == 0) write_header(packed, kLayoutCudaSparse24, shape);
    if (thread >= rounded_up(shape.n, 16) * runs) return;
    const int64_t row = thread / runs, run = thread % runs;
    unsigned words[4] = {}, places = 0;
    for (int i = 0; i < 8; i++) {
        unsigned four[4] = {};
        for (int j = 0; j < 4 && row < shape.n; j++) four[j] = code_at(codes, shape, row, run * 32 + i * 4 + j);
        const KeptPair pair = keep_pair(four);
        if (!pair.valid) atomicAdd(invalid, 1);
        words[i / 2] |= (pair.first | pair.second << 8) << i % 2 * 16;
        places |= pair.places << i * 4;
    }
    int8_t* const body = static_cast<int8_t*>(packed) + header_bytes;
    if (row < shape.n) store_16(body + thread * 16, words);
    // Lane 4g + 2h + e of a 16x64 block has the places of row g + 8e, columns 32h .. 32h + 31.
    const int64_t lane = row % 8 * 4 + run % 2 * 2 + row % 16 / 8;
    const int64_t word = (row / 16 * (runs / 2) + run / 2) * 32 + lane;
    reinterpret_cast<unsigned*>(body + shape.n * sparse24_row_bytes(shape.k))[word] = places;
}

}  // namespace ds_compress::linear
