// Rows of floats to rows of codes. To be included in a .cpp of one instruction set.
//
// A `Codes` type says how an instruction set wants its codes:
//     Stored               int16_t, or uint8_t for codes + 128
//     store(to, a, b)      writes 2 * kLanes codes from whole int32
//     Correction           what the product of a row of codes must be corrected by, gathered while they are written
#pragma once

#include "../elementwise/simd.h"
#include "linear.h"

namespace ds_compress::cpu {
namespace {

constexpr int64_t kCodeStrip = 2 * kLanes;

struct RowScale {
    float value;
    bool codes_are_zero;  // the row has a NaN or an Inf
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
        for (int j = 0; j < 4; j++)
            best[j] = larger(best[j], bits_of(Format::load(x + i + j * kLanes)) & magnitude);
    for (; i + kLanes <= count; i += kLanes)
        best[0] = larger(best[0], bits_of(Format::load(x + i)) & magnitude);
    auto largest = static_cast<uint32_t>(
        largest_of(larger(larger(best[0], best[1]), larger(best[2], best[3]))));
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

// Codes of `count` values, then zeros up to a multiple of kCodeStrip. kNanIsZero: a quotient that is NaN has code 0.
template <class Codes, class Format, bool kNanIsZero>
DSC_INLINE void quantize_row(const typename Format::Stored* x, int64_t count, float scale, int steps,
                             typename Codes::Stored* codes, typename Codes::Correction& correction) {
    const Floats divisor = splat(scale);
    const Floats low = splat(static_cast<float>(-steps)), high = splat(127.0f);
    const auto code = [&](const typename Format::Stored* from) __attribute__((always_inline)) {
        const Floats quotient = Format::load(from) / divisor;
        const Ints whole = nearest(clamp(quotient, low, high));
        return kNanIsZero ? whole & (Ints)(quotient == quotient) : whole;
    };
    int64_t i = 0;
    for (; i + kCodeStrip <= count; i += kCodeStrip)
        correction.add(Codes::store(codes + i, code(x + i), code(x + i + kLanes)));
    if (i == count) return;
    typename Format::Stored rest[kCodeStrip] = {};
    for (int64_t j = i; j < count; j++) rest[j - i] = x[j];
    correction.add(Codes::store(codes + i, code(rest), code(rest + kLanes)));
}

template <class Codes>
DSC_INLINE void zero_row(int64_t count, typename Codes::Stored* codes) {
    for (int64_t i = 0; i < count; i += kCodeStrip) Codes::store(codes + i, Ints{}, Ints{});
}

}  // namespace
}  // namespace ds_compress::cpu
