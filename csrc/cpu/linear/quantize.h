// Rows of floats to rows of quantized values. To be included in a .cpp of one instruction set.
//
// A `Values` type says how an instruction set wants its quantized values:
//     Stored               int16_t, or uint8_t for quantized values + 128
//     store(to, a, b)      writes 2 * kLanes quantized values from whole int32
//     Correction           what the product of a quantized row must be corrected by, gathered while they are written
#pragma once

#include "../elementwise/simd.h"
#include "linear.h"

namespace ds_compress::cpu {
namespace {

constexpr int64_t kQuantizedStrip = 2 * kLanes;

struct RowScale {
    float value;
    bool all_zero;  // the row has a NaN or an Inf
};

DSC_INLINE Ints nearest(Floats value) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtps_epi32(value);
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtps_epi32(value);
#else
    return __builtin_convertvector(round_half_even(value), Ints);
#endif
}

// The bits of the largest magnitude, so that Inf and NaN win.
template <class Format>
DSC_INLINE uint32_t largest_magnitude(const typename Format::Stored* x, int64_t count) {
    const Ints magnitude = splat(INT32_MAX);
    Ints best[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) best[j] = larger(best[j], bits_of(Format::load(x + i + j * kLanes)) & magnitude);
    for (; i + kLanes <= count; i += kLanes) best[0] = larger(best[0], bits_of(Format::load(x + i)) & magnitude);
    auto largest = static_cast<uint32_t>(largest_of(larger(larger(best[0], best[1]), larger(best[2], best[3]))));
    for (; i < count; i++) {
        const uint32_t bits = math::bits_of(Format::widen(x[i])) & math::kMagnitudeBits;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

template <class Format>
DSC_INLINE bool has_nan(const typename Format::Stored* x, int64_t count) {
    return largest_magnitude<Format>(x, count) > math::kInfinityBits;
}

template <class Format>
DSC_INLINE RowScale row_scale(const typename Format::Stored* x, int64_t count, const float* given, int steps) {
    if (given != nullptr) {
        const bool bad = has_nan<Format>(x, count);
        return {bad ? math::float_of(math::kNanBits) : *given, bad};
    }
    const uint32_t largest = largest_magnitude<Format>(x, count);
    return {math::row_scale(largest, static_cast<float>(steps)), largest >= math::kInfinityBits};
}

// x / divisor, clamped, to the nearest integer. A division takes the processor longer than four fused products.
// kByReciprocal: the estimate x / divisor is mended by its remainder (see division.h, whose numbers these are), so that
// the integer is that of the true quotient; for divisors from 2^-100 to 2^100.
template <bool kByReciprocal>
struct Quantizer {
    Floats low, high;
    Floats divisor, reciprocal, rest, limit;

    DSC_INLINE Quantizer(float scale, int steps)
        : low(splat(static_cast<float>(-steps))), high(splat(127.0f)), divisor(splat(scale)) {
        if constexpr (kByReciprocal) {
            reciprocal = 1.0f / divisor;
            rest = multiply_add(-divisor, reciprocal, splat(1.0f)) * reciprocal;
            limit = divisor * 1024.0f;  // an Inf would have no remainder
        }
    }
    DSC_INLINE Floats quotient(Floats x) const {
        if constexpr (kByReciprocal) {
            x = clamp(x, -limit, limit);
            const Floats estimate = multiply_add(x, reciprocal, x * rest);
            return multiply_add(multiply_add(-estimate, divisor, x), reciprocal, estimate);
        } else {
            return x / divisor;
        }
    }
    template <bool kNanIsZero>
    DSC_INLINE Ints operator()(Floats x) const {
        const Floats found = quotient(x);
        const Ints whole = nearest(clamp(found, low, high));
        return kNanIsZero ? whole & (Ints)(found == found) : whole;
    }
};

template <class Values, class Format, bool kNanIsZero, class Quantize>
DSC_INLINE void quantize_row_by(const Quantize& quantize, const typename Format::Stored* x, int64_t count,
                                typename Values::Stored* quantized, typename Values::Correction& correction) {
    const auto q = [&](const typename Format::Stored* from) __attribute__((always_inline)) {
        return quantize.template operator()<kNanIsZero>(Format::load(from));
    };
    int64_t i = 0;
    for (; i + kQuantizedStrip <= count; i += kQuantizedStrip)
        correction.add(Values::store(quantized + i, q(x + i), q(x + i + kLanes)));
    if (i == count) return;
    typename Format::Stored rest[kQuantizedStrip] = {};
    for (int64_t j = i; j < count; j++) rest[j - i] = x[j];
    correction.add(Values::store(quantized + i, q(rest), q(rest + kLanes)));
}

// `count` values, quantized, then zeros up to a multiple of kQuantizedStrip. kNanIsZero: a quotient that is NaN becomes
// 0.
template <class Values, class Format, bool kNanIsZero>
DSC_INLINE void quantize_row(const typename Format::Stored* x, int64_t count, float scale, int steps,
                             typename Values::Stored* quantized, typename Values::Correction& correction) {
    if (kFuses && scale >= 0x1p-100f && scale <= 0x1p100f)
        quantize_row_by<Values, Format, kNanIsZero>(Quantizer<true>(scale, steps), x, count, quantized, correction);
    else
        quantize_row_by<Values, Format, kNanIsZero>(Quantizer<false>(scale, steps), x, count, quantized, correction);
}

template <class Values>
DSC_INLINE void zero_row(int64_t count, typename Values::Stored* quantized) {
    for (int64_t i = 0; i < count; i += kQuantizedStrip) Values::store(quantized + i, Ints{}, Ints{});
}

}  // namespace
}  // namespace ds_compress::cpu
