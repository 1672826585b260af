// Measuring what a row spans, and quantizing and reading it back in one pass.
// To be included in a .cpp of one instruction set.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ds_compress::cpu {
namespace {

template <class Format, bool kSymmetric>
Span measure_as(const typename Format::Stored* values, int64_t count) {
    constexpr int kTurns = 4;  // independent chains of maxima
    Ints largest[kTurns] = {};
    Floats lowest[kTurns], highest[kTurns];
    const float infinity = math::float_of(math::kInfinityBits);
#pragma GCC unroll 4
    for (int t = 0; t < kTurns; t++) {
        lowest[t] = splat(infinity);
        highest[t] = splat(-infinity);
    }
    int64_t i = 0;
    for (; i + kTurns * kLanes <= count; i += kTurns * kLanes) {
#pragma GCC unroll 4
        for (int t = 0; t < kTurns; t++) {
            const Floats x = Format::load(values + i + t * kLanes);
            largest[t] = larger(largest[t], bits_of(x) & INT32_MAX);
            if constexpr (!kSymmetric) {
                lowest[t] = smaller(x, lowest[t]);
                highest[t] = larger(x, highest[t]);
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 1; t < kTurns; t++) {
        largest[0] = larger(largest[0], largest[t]);
        lowest[0] = smaller(lowest[0], lowest[t]);
        highest[0] = larger(highest[0], highest[t]);
    }
    Span span{infinity, -infinity, static_cast<uint32_t>(largest_of(largest[0]))};
    if constexpr (!kSymmetric) {
        span.lowest = least_of(lowest[0]);
        span.highest = largest_of(highest[0]);
    }
    for (; i < count; i++) {
        const float x = Format::widen(values[i]);
        const uint32_t bits = math::bits_of(x) & math::kMagnitudeBits;
        if (bits > span.largest_bits) span.largest_bits = bits;
        if constexpr (kSymmetric) continue;
        if (x < span.lowest) span.lowest = x;
        if (x > span.highest) span.highest = x;
    }
    return span;
}

Span measure(const void* values, Float type, int64_t count, bool symmetric) {
    const auto* wide = static_cast<const float*>(values);
    const auto* narrow = static_cast<const uint16_t*>(values);
    switch (type) {
        case Float::bf16:
            return symmetric ? measure_as<Bf16, true>(narrow, count) : measure_as<Bf16, false>(narrow, count);
        case Float::fp16:
            return symmetric ? measure_as<Fp16, true>(narrow, count) : measure_as<Fp16, false>(narrow, count);
        default:
            return symmetric ? measure_as<Fp32, true>(wide, count) : measure_as<Fp32, false>(wide, count);
    }
}

// `kExtreme`: see math::is_extreme.
template <class Format, bool kOffset, bool kMask, bool kExtreme>
void fake_quantize_as(const typename Format::Stored* x, typename Format::Stored* y, int64_t count, Grid grid,
                      uint8_t* mask, int64_t bit) {
    const Floats scale = splat(kExtreme ? grid.scale * math::kShrink : grid.scale);
    const Floats offset = splat(kExtreme ? grid.offset * math::kShrink : grid.offset);
    [[maybe_unused]] const Floats limit = splat(Format::kLargest * math::kShrink);
    const Floats low = splat(grid.low), high = splat(grid.high);
    [[maybe_unused]] BitWriter writer(kMask ? mask : reinterpret_cast<uint8_t*>(&grid), kMask ? bit : 0);
    const auto one = [&](const typename Format::Stored* from, typename Format::Stored* to, int lanes)
                         __attribute__((always_inline)) {
                             Floats value = Format::load(from);
                             if constexpr (kExtreme) value = value * splat(math::kShrink);
                             if constexpr (kOffset) value = value - offset;
                             value = round_half_even(value / scale);
                             if constexpr (kMask) {
                                 const uint32_t inside = sign_bits((Ints)(value >= low) & (Ints)(value <= high));
                                 writer.push(inside & (0xffffffffu >> (32 - lanes)), lanes);
                             }
                             value = clamp(value, low, high) * scale;
                             if constexpr (kOffset) value = value + offset;
                             if constexpr (kExtreme) value = clamp(value, -limit, limit) * splat(math::kGrow);
                             Format::save(to, value);
                         };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        __builtin_prefetch(x + count + i);  // the next row, while this one is in cache
        one(x + i, y + i, kLanes);
    }
    if (i < count) {
        typename Format::Stored rest[kLanes] = {};
        memcpy(rest, x + i, static_cast<size_t>(count - i) * sizeof rest[0]);
        one(rest, rest, static_cast<int>(count - i));
        memcpy(y + i, rest, static_cast<size_t>(count - i) * sizeof rest[0]);
    }
    if constexpr (kMask) writer.finish();
}

template <class Format, bool kOffset, bool kMask>
void fake_quantize_row(const typename Format::Stored* x, typename Format::Stored* y, int64_t count, Grid grid,
                       uint8_t* mask, int64_t bit) {
    if (math::is_extreme({grid.scale, grid.offset}, Format::kLargest))
        fake_quantize_as<Format, kOffset, kMask, true>(x, y, count, grid, mask, bit);
    else
        fake_quantize_as<Format, kOffset, kMask, false>(x, y, count, grid, mask, bit);
}

template <class Format>
void fake_quantize_of(const void* x, void* y, int64_t count, Grid grid, uint8_t* mask, int64_t bit) {
    using Stored = typename Format::Stored;
    const auto* from = static_cast<const Stored*>(x);
    auto* to = static_cast<Stored*>(y);
    if (mask != nullptr)
        grid.has_offset ? fake_quantize_row<Format, true, true>(from, to, count, grid, mask, bit)
                        : fake_quantize_row<Format, false, true>(from, to, count, grid, mask, bit);
    else
        grid.has_offset ? fake_quantize_row<Format, true, false>(from, to, count, grid, mask, bit)
                        : fake_quantize_row<Format, false, false>(from, to, count, grid, mask, bit);
}

void fake_quantize(const void* x, void* y, Float type, int64_t count, Grid grid, uint8_t* mask, int64_t bit) {
    switch (type) {
        case Float::bf16:
            return fake_quantize_of<Bf16>(x, y, count, grid, mask, bit);
        case Float::fp16:
            return fake_quantize_of<Fp16>(x, y, count, grid, mask, bit);
        default:
            return fake_quantize_of<Fp32>(x, y, count, grid, mask, bit);
    }
}

}  // namespace
}  // namespace ds_compress::cpu
