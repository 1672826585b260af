// Payloads of a quantized reduction: quantize with error feedback, read back, add up, and both at once.
// To be included in a .cpp of one instruction set.
#pragma once

#include "payload.h"
#include "kernels.h"

namespace ds_compress::cpu {
namespace {

constexpr int kLargestBlock = 8192;

// One block's values, when they cannot be read in place.
struct Buffer {
    alignas(64) float values[kLargestBlock];
};

// Quantizes `block` values; where `rest` is given it receives t - q * scale, unless a value is not finite.
template <int kBits>
float quantize_block(const float* values, int block, uint8_t* quantized, float* rest) {
    Ints largest[2] = {};
    for (int i = 0; i < block; i += 2 * kLanes) {
        largest[0] = larger(largest[0], bits_of(load_as<Floats>(values + i)) & INT32_MAX);
        largest[1] = larger(largest[1], bits_of(load_as<Floats>(values + i + kLanes)) & INT32_MAX);
    }
    constexpr float kQuantMax = kBits == 8 ? 127.0f : 7.0f;
    const auto largest_bits = static_cast<uint32_t>(largest_of(larger(largest[0], largest[1])));
    const float scale = math::block_scale(largest_bits, kQuantMax);
    if (!(scale > 0.0f)) {
        memset(quantized, 0, static_cast<size_t>(block) * kBits / 8);
        if (rest != nullptr && rest != values && scale == 0.0f) memcpy(rest, values, 4 * static_cast<size_t>(block));
        return scale;
    }
    const Floats scales = splat(scale), low = splat(-kQuantMax), high = splat(kQuantMax);
    for (int i = 0; i < block; i += kStrip) {
        // While this block is in cache, memory brings the next one.
        __builtin_prefetch(values + block + i);
        __builtin_prefetch(values + block + i + 16);
        Floats strip[kPerStrip];
#pragma GCC unroll 8
        for (int j = 0; j < kPerStrip; j++) {
            const Floats value = load_as<Floats>(values + i + j * kLanes);
            const Floats q = clamp(round_half_even(value / scales), low, high);
            strip[j] = q;
            // A quantized value is an integer: adding zero drops the sign of -0.0.
            if (rest != nullptr) store(rest + i + j * kLanes, value - (q + 0.0f) * scales);
        }
        write_strip<kBits>(strip, quantized + i * kBits / 8);
    }
    return scale;
}

// Quantizes the `count` values of a block that lie in `buffer` into place `index` of a payload, and keeps the residual.
template <int kBits>
void finish_block(Buffer& buffer, int count, float* residual, uint8_t* payload, const BlockFormat& format,
                  int64_t index) {
    memset(buffer.values + count, 0, 4 * static_cast<size_t>(format.block - count));
    uint8_t* quantized = payload + 4 * format.blocks + index * format.value_bytes();
    float scale;
    if (residual != nullptr && count == format.block) {
        scale = quantize_block<kBits>(buffer.values, format.block, quantized, residual);
    } else {
        scale = quantize_block<kBits>(buffer.values, format.block, quantized, residual ? buffer.values : nullptr);
        if (residual != nullptr && scale == scale) memcpy(residual, buffer.values, 4 * static_cast<size_t>(count));
    }
    memcpy(payload + 4 * index, &scale, sizeof scale);
}

DSC_INLINE int count_in_block(int64_t count, const BlockFormat& format, int64_t place) {
    const int64_t left = count - place * format.block;
    return static_cast<int>(left < 0 ? 0 : left < format.block ? left : format.block);
}

template <class Format>
DSC_INLINE void gather_values(const typename Format::Stored* from, const float* residual, int count, float* to) {
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        Floats value = Format::load(from + i);
        if (residual != nullptr) value = value + load_as<Floats>(residual + i);
        store(to + i, value);
    }
    for (; i < count; i++) {
        const float value = Format::widen(from[i]);
        to[i] = residual != nullptr ? value + residual[i] : value;
    }
}

template <class Format, int kBits>
void block_quantize_as(const typename Format::Stored* values, int64_t count, float* residual, uint8_t* payload,
                       const BlockFormat& format, int64_t first, int64_t last) {
    Buffer buffer;
    for (int64_t index = first; index < last; index++) {
        const int64_t begin = (index - first) * format.block;
        const int here = count_in_block(count, format, index - first);
        if constexpr (sizeof(typename Format::Stored) == 4)
            if (here == format.block && residual == nullptr) {
                const float scale = quantize_block<kBits>(
                    values + begin, format.block, payload + 4 * format.blocks + index * format.value_bytes(), nullptr);
                memcpy(payload + 4 * index, &scale, sizeof scale);
                continue;
            }
        float* rest = residual != nullptr ? residual + begin : nullptr;
        if (here > 0) gather_values<Format>(values + begin, rest, here, buffer.values);
        finish_block<kBits>(buffer, here, rest, payload, format, index);
    }
}

template <int kBits>
void block_quantize_bits(const void* values, Float type, int64_t count, float* residual, uint8_t* payload,
                         const BlockFormat& format, int64_t first, int64_t last) {
    const auto* narrow = static_cast<const uint16_t*>(values);
    switch (type) {
        case Float::bf16:
            return block_quantize_as<Bf16, kBits>(narrow, count, residual, payload, format, first, last);
        case Float::fp16:
            return block_quantize_as<Fp16, kBits>(narrow, count, residual, payload, format, first, last);
        default:
            return block_quantize_as<Fp32, kBits>(static_cast<const float*>(values), count, residual, payload, format,
                                                  first, last);
    }
}

void block_quantize(const void* values, Float type, int64_t count, float* residual, uint8_t* payload,
                    BlockFormat format, int64_t first, int64_t last) {
    const auto run = format.bits == 8 ? block_quantize_bits<8> : block_quantize_bits<4>;
    run(values, type, count, residual, payload, format, first, last);
}

// q * scale of one block, whole strips.
template <class Format, int kBits>
DSC_INLINE void dequantize_block(const uint8_t* quantized, float scale, int block, typename Format::Stored* to) {
    const Floats scales = splat(scale);
    for (int i = 0; i < block; i += kStrip) {
        Floats strip[kPerStrip];
        read_strip<kBits>(quantized + i * kBits / 8, strip);
#pragma GCC unroll 8
        for (int j = 0; j < kPerStrip; j++) Format::save(to + i + j * kLanes, strip[j] * scales);
    }
}

template <class Format, int kBits>
void block_dequantize_as(const uint8_t* payload, const BlockFormat& format, int64_t first, int64_t last,
                         typename Format::Stored* out, int64_t count) {
    typename Format::Stored buffer[kLargestBlock];
    for (int64_t index = first; index < last; index++) {
        const int here = count_in_block(count, format, index - first);
        const uint8_t* quantized = payload + 4 * format.blocks + index * format.value_bytes();
        const float scale = load_as<float>(payload + 4 * index);
        auto* target = out + (index - first) * format.block;
        const bool whole = here == format.block;
        dequantize_block<Format, kBits>(quantized, scale, format.block, whole ? target : buffer);
        if (!whole && here > 0) memcpy(target, buffer, static_cast<size_t>(here) * sizeof buffer[0]);
    }
}

template <int kBits>
void block_dequantize_bits(const uint8_t* payload, const BlockFormat& format, int64_t first, int64_t last, void* out,
                           Float type, int64_t count) {
    auto* narrow = static_cast<uint16_t*>(out);
    switch (type) {
        case Float::bf16:
            return block_dequantize_as<Bf16, kBits>(payload, format, first, last, narrow, count);
        case Float::fp16:
            return block_dequantize_as<Fp16, kBits>(payload, format, first, last, narrow, count);
        default:
            return block_dequantize_as<Fp32, kBits>(payload, format, first, last, static_cast<float*>(out), count);
    }
}

void block_dequantize(const uint8_t* payload, BlockFormat format, int64_t first, int64_t last, void* out, Float type,
                      int64_t count) {
    const auto run = format.bits == 8 ? block_dequantize_bits<8> : block_dequantize_bits<4>;
    run(payload, format, first, last, out, type, count);
}

// The sum over the payloads, in their order, of one block; the sums of a strip stay in registers.
template <int kBits>
DSC_INLINE void sum_block(const Payloads& payloads, const BlockFormat& format, int64_t index, float* to) {
    const int64_t stride = format.payload_bytes();
    const uint8_t* scales = payloads.data + 4 * index;
    const uint8_t* quantized = payloads.data + 4 * format.blocks + index * format.value_bytes();
    for (int i = 0; i < format.block; i += kStrip) {
        Floats sums[kPerStrip];
        for (int j = 0; j < kPerStrip; j++) sums[j] = splat(-0.0f);  // adding to -0.0 changes nothing, not even a sign
        for (int64_t w = 0; w < payloads.count; w++) {
            Floats strip[kPerStrip];
            read_strip<kBits>(quantized + w * stride + i * kBits / 8, strip);
            const Floats scale = splat(load_as<float>(scales + w * stride) * payloads.multiplier);
#pragma GCC unroll 8
            for (int j = 0; j < kPerStrip; j++) sums[j] = sums[j] + strip[j] * scale;
        }
#pragma GCC unroll 8
        for (int j = 0; j < kPerStrip; j++) store(to + i + j * kLanes, sums[j]);
    }
}

template <int kBits>
void block_reduce_bits(const Payloads& payloads, const BlockFormat& format, int64_t first, int64_t last, float* out,
                       int64_t count) {
    Buffer buffer;
    for (int64_t index = first; index < last; index++) {
        const int here = count_in_block(count, format, index - first);
        float* target = out + (index - first) * format.block;
        const bool whole = here == format.block;
        sum_block<kBits>(payloads, format, index, whole ? target : buffer.values);
        if (!whole && here > 0) memcpy(target, buffer.values, 4 * static_cast<size_t>(here));
    }
}

void block_reduce(Payloads payloads, BlockFormat format, int64_t first, int64_t last, float* out, int64_t count) {
    const auto run = format.bits == 8 ? block_reduce_bits<8> : block_reduce_bits<4>;
    run(payloads, format, first, last, out, count);
}

template <int kBits>
void block_reduce_quantize_bits(const Payloads& payloads, const BlockFormat& format, int64_t first, int64_t last,
                                int64_t count, float* residual, uint8_t* payload) {
    Buffer buffer;
    for (int64_t index = first; index < last; index++) {
        const int here = count_in_block(count, format, index - first);
        sum_block<kBits>(payloads, format, index, buffer.values);
        float* rest = residual != nullptr ? residual + (index - first) * format.block : nullptr;
        if (rest != nullptr) gather_values<Fp32>(buffer.values, rest, here, buffer.values);
        finish_block<kBits>(buffer, here, rest, payload, format, index);
    }
}

void block_reduce_quantize(Payloads payloads, BlockFormat format, int64_t first, int64_t last, int64_t count,
                           float* residual, uint8_t* payload) {
    const auto run = format.bits == 8 ? block_reduce_quantize_bits<8> : block_reduce_quantize_bits<4>;
    run(payloads, format, first, last, count, residual, payload);
}

}  // namespace
}  // namespace ds_compress::cpu
