// Whole quantized values between floats and the bytes of a payload, a strip of 32 at a time.
// To be included in a .cpp of one instruction set.
#pragma once

#include "simd.h"

namespace ds_compress::cpu {
namespace {

using Bytes16 = uint8_t __attribute__((vector_size(16)));

// 32 whole numbers within int8 to 32 bytes.
DSC_INLINE void floats_to_bytes(const Floats (&quantized)[kPerStrip], int8_t* to) {
#if defined(DSC_AVX512)
    store(to, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(quantized[0])));
    store(to + 16, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(quantized[1])));
#elif defined(DSC_AVX2)
    const __m256i low = _mm256_packs_epi32(_mm256_cvttps_epi32(quantized[0]), _mm256_cvttps_epi32(quantized[1]));
    const __m256i high = _mm256_packs_epi32(_mm256_cvttps_epi32(quantized[2]), _mm256_cvttps_epi32(quantized[3]));
    // Packing works on halves of 16 bytes; this puts the eight runs of four quantized values in order.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    store(to, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
#elif defined(DSC_SSE2)
    for (int half = 0; half < 2; half++) {
        const Floats* part = quantized + 4 * half;
        const __m128i low = _mm_packs_epi32(_mm_cvttps_epi32(part[0]), _mm_cvttps_epi32(part[1]));
        const __m128i high = _mm_packs_epi32(_mm_cvttps_epi32(part[2]), _mm_cvttps_epi32(part[3]));
        store(to + 16 * half, _mm_packs_epi16(low, high));
    }
#else
    for (int i = 0; i < kStrip; i++) to[i] = static_cast<int8_t>(quantized[i / kLanes][i % kLanes]);
#endif
}

DSC_INLINE void bytes_to_floats(const int8_t* from, Floats (&quantized)[kPerStrip]) {
#pragma GCC unroll 8
    for (int i = 0; i < kPerStrip; i++) {
#if defined(DSC_AVX512)
        quantized[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(from + 16 * i)));
#elif defined(DSC_AVX2)
        quantized[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load_as<long long>(from + 8 * i))));
#else
        Ints wide;
        for (int j = 0; j < kLanes; j++) wide[j] = from[kLanes * i + j];
        quantized[i] = __builtin_convertvector(wide, Floats);
#endif
    }
}

// 32 bytes within -8 .. 7 to 16 bytes of two nibbles, the even one low.
DSC_INLINE void bytes_to_nibbles(const int8_t* from, uint8_t* to) {
    const Bytes16 a = load_as<Bytes16>(from), b = load_as<Bytes16>(from + 16);
    const Bytes16 even = __builtin_shuffle(a, b, Bytes16{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30});
    const Bytes16 odd = __builtin_shuffle(a, b, Bytes16{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
    store(to, (even & 15) | (odd << 4));
}

DSC_INLINE void nibbles_to_bytes(const uint8_t* from, int8_t* to) {
    const Bytes16 pairs = load_as<Bytes16>(from);
    const Bytes16 even = ((pairs & 15) ^ 8) - 8, odd = ((pairs >> 4) ^ 8) - 8;
    store(to, __builtin_shuffle(even, odd, Bytes16{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}));
    store(to + 16, __builtin_shuffle(even, odd, Bytes16{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}));
}

// Strips of a payload, quantized values of kBits bits.
template <int kBits>
DSC_INLINE void write_strip(const Floats (&quantized)[kPerStrip], uint8_t* to) {
    if constexpr (kBits == 8) {
        floats_to_bytes(quantized, reinterpret_cast<int8_t*>(to));
    } else {
        int8_t bytes[kStrip];
        floats_to_bytes(quantized, bytes);
        bytes_to_nibbles(bytes, to);
    }
}

template <int kBits>
DSC_INLINE void read_strip(const uint8_t* from, Floats (&quantized)[kPerStrip]) {
    if constexpr (kBits == 8) {
        bytes_to_floats(reinterpret_cast<const int8_t*>(from), quantized);
    } else {
        int8_t bytes[kStrip];
        nibbles_to_bytes(from, bytes);
        bytes_to_floats(bytes, quantized);
    }
}

}  // namespace
}  // namespace ds_compress::cpu
