// Messages of a quantized reduction: quantize with error feedback, read back, add up, and both at once.
//
// A warp works on one block of a message, a lane on four neighbouring elements at a time. What is quantized is read
// twice, the second time from L1: a block of up to 8192 values does not fit into the registers of a warp.
#pragma once

#include "ds_compress/math.h"
#include "grid.cuh"

namespace ds_compress::elementwise {

constexpr int quad = 4;  // elements that a lane handles at a time

struct Format {
    int block;
    int64_t blocks;  // in one message
    int code_bytes;  // of one block
    DSC_DEVICE int64_t message_bytes() const { return blocks * (4 + code_bytes); }
    DSC_DEVICE int64_t codes_at(int64_t index) const { return 4 * blocks + index * code_bytes; }
};

/// Messages may begin at any byte.
DSC_DEVICE float load_scale(const uint8_t* from) {
    return math::float_of(static_cast<uint32_t>(from[0]) | static_cast<uint32_t>(from[1]) << 8 |
                          static_cast<uint32_t>(from[2]) << 16 | static_cast<uint32_t>(from[3]) << 24);
}

DSC_DEVICE void store_scale(uint8_t* to, float scale) {
    const uint32_t bits = math::bits_of(scale);
    for (int i = 0; i < 4; i++) to[i] = static_cast<uint8_t>(bits >> (8 * i));
}

/// Four codes from place `i` of a block on.
template <int bits>
DSC_DEVICE void load_codes(const uint8_t* codes, int i, bool aligned, float (&values)[quad]) {
    uint32_t word;
    if constexpr (bits == 8) {
        if (aligned) {
            word = *reinterpret_cast<const uint32_t*>(codes + i);
        } else {
            word = codes[i] | codes[i + 1] << 8 | codes[i + 2] << 16 | static_cast<uint32_t>(codes[i + 3]) << 24;
        }
#pragma unroll
        for (int j = 0; j < quad; j++) values[j] = static_cast<float>(static_cast<int8_t>(word >> (8 * j)));
    } else {
        word = codes[i / 2] | static_cast<uint32_t>(codes[i / 2 + 1]) << 8;
#pragma unroll
        for (int j = 0; j < quad; j++)
            values[j] = static_cast<float>(static_cast<int>((word >> (4 * j) & 15u) ^ 8u) - 8);
    }
}

template <int bits>
DSC_DEVICE void store_codes(uint8_t* codes, int i, bool aligned, const int (&values)[quad]) {
    if constexpr (bits == 8) {
        const uint32_t word = (values[0] & 255u) | (values[1] & 255u) << 8 | (values[2] & 255u) << 16 |
                              (values[3] & 255u) << 24;
        if (aligned) {
            *reinterpret_cast<uint32_t*>(codes + i) = word;
        } else {
#pragma unroll
            for (int j = 0; j < quad; j++) codes[i + j] = static_cast<uint8_t>(word >> (8 * j));
        }
    } else {
        codes[i / 2] = static_cast<uint8_t>((values[0] & 15) | (values[1] & 15) << 4);
        codes[i / 2 + 1] = static_cast<uint8_t>((values[2] & 15) | (values[3] & 15) << 4);
    }
}

/// Four values from `i` on of `count`; beyond, 0.
template <class T>
DSC_DEVICE void load_values(const T* from, int64_t i, int64_t count, bool aligned, float (&values)[quad]) {
    struct alignas(quad * sizeof(T)) Quad {
        T values[quad];
    };
    if (aligned && i + quad <= count) {
        const Quad loaded = *reinterpret_cast<const Quad*>(from + i);
#pragma unroll
        for (int j = 0; j < quad; j++) values[j] = to_float(loaded.values[j]);
    } else {
#pragma unroll
        for (int j = 0; j < quad; j++) values[j] = i + j < count ? to_float(from[i + j]) : 0.0f;
    }
}

template <class T>
DSC_DEVICE bool is_aligned(const T* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % (quad * sizeof(T)) == 0;
}

// --- what a block is quantized from ---------------------------------------------------------------------------------

/// Part of a tensor: `count` values of a message, the others are 0.
template <class T>
struct Values {
    const T* data;
    int64_t count;
    bool aligned;
    DSC_DEVICE void load(int64_t i, float (&values)[quad]) const { load_values(data, i, count, aligned, values); }
};

/// The sum over messages, in their order, of code * (scale * multiplier); values beyond `count` are 0.
template <int bits>
struct Sum {
    const uint8_t* messages;
    int64_t message_count, count;
    Format format;
    float multiplier;
    DSC_DEVICE void load(int64_t i, float (&values)[quad]) const {
        const int64_t index = i / format.block, bytes = format.message_bytes();
        const int place = static_cast<int>(i - index * format.block);
        const bool aligned = reinterpret_cast<uintptr_t>(messages) % 4 == 0;
        for (int64_t w = 0; w < message_count; w++) {
            const uint8_t* const message = messages + w * bytes;
            const float scale = math::multiply(load_scale(message + 4 * index), multiplier);
            float codes[quad];
            load_codes<bits>(message + format.codes_at(index), place, aligned, codes);
#pragma unroll
            for (int j = 0; j < quad; j++) {
                const float product = math::multiply(codes[j], scale);
                values[j] = w == 0 ? product : math::add(values[j], product);
            }
        }
#pragma unroll
        for (int j = 0; j < quad; j++)
            if (i + j >= count) values[j] = 0.0f;
    }
};

/// Block `index` of `message` from `source`; `residual` (or null) has `count` values and begins with the message.
template <int bits, class Source>
DSC_DEVICE void quantize_block(const Source& source, int64_t count, float* residual, uint8_t* message,
                               const Format& format, int64_t index) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const bool residual_aligned = is_aligned(residual);
    const auto load = [&](int64_t i, float (&values)[quad]) {
        source.load(i, values);
        if (residual == nullptr) return;
        float rest[quad];
        load_values(residual, i, count, residual_aligned, rest);
#pragma unroll
        for (int j = 0; j < quad; j++)
            if (i + j < count) values[j] = math::add(values[j], rest[j]);
    };
    const int64_t begin = index * format.block;
    unsigned largest = 0;
    for (int i = lane * quad; i < format.block; i += 32 * quad) {
        float values[quad];
        load(begin + i, values);
#pragma unroll
        for (int j = 0; j < quad; j++) largest = max(largest, math::bits_of(values[j]) & math::kMagnitudeBits);
    }
    largest = __reduce_max_sync(~0u, largest);

    constexpr float largest_code = bits == 8 ? 127.0f : 7.0f;
    const float scale = math::block_scale(largest, largest_code);
    const bool keeps_residual = residual != nullptr && largest < math::kInfinityBits;
    if (lane == 0) store_scale(message + 4 * index, scale);
    uint8_t* const codes = message + format.codes_at(index);
    const bool aligned = reinterpret_cast<uintptr_t>(message) % 4 == 0;
    for (int i = lane * quad; i < format.block; i += 32 * quad) {
        float values[quad];
        int rounded[quad] = {};
        load(begin + i, values);
#pragma unroll
        for (int j = 0; j < quad; j++) {
            if (scale > 0.0f)
                rounded[j] = static_cast<int>(
                    math::clamp(math::round_half_even(math::divide(values[j], scale)), -largest_code, largest_code));
            if (keeps_residual && begin + i + j < count)
                residual[begin + i + j] =
                    math::subtract(values[j], math::multiply(static_cast<float>(rounded[j]), scale));
        }
        store_codes<bits>(codes, i, aligned, rounded);
    }
}

// --- kernels --------------------------------------------------------------------------------------------------------

template <class T, int bits>
__global__ void __launch_bounds__(threads)
    block_quantize_kernel(const T* __restrict__ x, int64_t numel, float* residual, uint8_t* __restrict__ messages,
                          int64_t message_count, int64_t chunk, Format format) {
    for (int64_t unit = first_warp(); unit < message_count * format.blocks; unit += warp_stride()) {
        const int64_t row = unit / format.blocks;
        const int64_t begin = row * chunk < numel ? row * chunk : numel;
        const int64_t count = numel - begin < chunk ? numel - begin : chunk;
        const Values<T> values = {x + begin, count, is_aligned(x + begin)};
        quantize_block<bits>(values, count, residual != nullptr ? residual + begin : nullptr,
                             messages + row * format.message_bytes(), format, unit % format.blocks);
    }
}

template <int bits>
__global__ void __launch_bounds__(threads)
    block_reduce_quantize_kernel(Sum<bits> sum, float* residual, uint8_t* __restrict__ message) {
    for (int64_t index = first_warp(); index < sum.format.blocks; index += warp_stride())
        quantize_block<bits>(sum, sum.count, residual, message, sum.format, index);
}

template <class T>
DSC_DEVICE void store_values(T* to, int64_t i, int64_t count, const float (&values)[quad]) {
#pragma unroll
    for (int j = 0; j < quad; j++)
        if (i + j < count) to[i + j] = from_float<T>(values[j]);
}

template <class T, int bits>
__global__ void __launch_bounds__(threads)
    block_dequantize_kernel(const uint8_t* __restrict__ messages, int64_t message_count, int64_t chunk, Format format,
                            T* __restrict__ out, int64_t numel) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const bool aligned = reinterpret_cast<uintptr_t>(messages) % 4 == 0;
    for (int64_t unit = first_warp(); unit < message_count * format.blocks; unit += warp_stride()) {
        const int64_t row = unit / format.blocks, index = unit % format.blocks;
        const uint8_t* const message = messages + row * format.message_bytes();
        const float scale = load_scale(message + 4 * index);
        const int64_t end = (row + 1) * chunk < numel ? (row + 1) * chunk : numel;
        for (int i = lane * quad; i < format.block; i += 32 * quad) {
            float values[quad];
            load_codes<bits>(message + format.codes_at(index), i, aligned, values);
#pragma unroll
            for (int j = 0; j < quad; j++) values[j] = math::multiply(values[j], scale);
            store_values(out, row * chunk + index * format.block + i, end, values);
        }
    }
}

template <int bits>
__global__ void __launch_bounds__(threads) block_reduce_kernel(Sum<bits> sum, float* __restrict__ out) {
    for (int64_t i = first_item() * quad; i < sum.count; i += stride() * quad) {
        float values[quad];
        sum.load(i, values);
        store_values(out, i, sum.count, values);
    }
}

}  // namespace ds_compress::elementwise
