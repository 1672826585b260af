// Two 16-bit numbers in each word of a vector, and two numbers in the halves of one.
// To be included in a .cpp of one instruction set.
#pragma once

#include "simd.h"

namespace ds_compress::cpu {
namespace {

// Of the halves of words, as signed integers.
DSC_INLINE Ints larger_halves(Ints a, Ints b) {
#if defined(DSC_AVX512)
    return (Ints)_mm512_max_epi16((__m512i)a, (__m512i)b);
#elif defined(DSC_AVX2)
    return (Ints)_mm256_max_epi16((__m256i)a, (__m256i)b);
#else
    using Halves = int16_t __attribute__((vector_size(4 * kLanes)));
    return (Ints)((Halves)a > (Halves)b ? (Halves)a : (Halves)b);
#endif
}

// The lower half of every word of the first, the upper of the second.
DSC_INLINE Ints joined_halves(Ints low, Ints high) { return (low & 0xffff) | (high & ~0xffff); }

// Bit i is the sign of half i: two to a word, the lower one first.
DSC_INLINE uint32_t half_sign_bits(Ints value) {
#if defined(DSC_AVX512)
    return _mm512_movepi16_mask((__m512i)value);
#elif defined(DSC_AVX2)
    const auto all = (__m256i)value;
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
#elif defined(DSC_SSE2)
    return static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16((__m128i)value, _mm_setzero_si128())));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; i++) {
        const auto word = static_cast<uint32_t>(value[i]);
        bits |= (word >> 15 & 1) << (2 * i) | (word >> 31) << (2 * i + 1);
    }
    return bits;
#endif
}

// One number in the lower half of the lanes, another in the upper.
DSC_INLINE Floats halves(float low, float high) {
    Ints is_high;
    for (int i = 0; i < kLanes; i++) is_high[i] = i < kLanes / 2 ? 0 : -1;
    return floats_of((bits_of(splat(low)) & ~is_high) | (bits_of(splat(high)) & is_high));
}

}  // namespace
}  // namespace ds_compress::cpu
