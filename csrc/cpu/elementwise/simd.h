// Vectors of the widest kind that this file's compiler flags allow, through gcc's vector extensions.
//
// Only what the extensions lack is written with intrinsics; every such function has a portable version that gives the
// same bits. To be included in a .cpp of one instruction set: everything here has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#include "ds_compress/math.h"

// DSC_PORTABLE_LANES (tests only) compiles what follows without intrinsics, for any width of vector.
#if defined(DSC_PORTABLE_LANES)
#elif defined(__AVX512F__)
#define DSC_AVX512 1
#elif defined(__AVX2__)
#define DSC_AVX2 1
#elif defined(__SSE2__)
#define DSC_SSE2 1
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ds_compress::cpu {
namespace {

#define DSC_INLINE __attribute__((unused, always_inline)) inline

#if defined(DSC_PORTABLE_LANES)
constexpr int kLanes = DSC_PORTABLE_LANES;
#elif defined(DSC_AVX512)
constexpr int kLanes = 16;
#elif defined(DSC_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kStrip = 32;  // elements that conversions take at a time; blocks are multiples of it
constexpr int kPerStrip = kStrip / kLanes;

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Shorts = uint16_t __attribute__((vector_size(2 * kLanes)));

template <class V, class T>
DSC_INLINE V load_as(const T* from) {
    V value;
    memcpy(&value, from, sizeof value);
    return value;
}

template <class V, class T>
DSC_INLINE void store(T* to, V value) {
    memcpy(to, &value, sizeof value);
}

DSC_INLINE Floats splat(float value) { return value - Floats{}; }  // subtracting keeps -0.0
DSC_INLINE Ints splat(int32_t value) { return value - Ints{}; }

DSC_INLINE Ints bits_of(Floats value) { return (Ints)value; }
DSC_INLINE Floats floats_of(Ints bits) { return (Floats)bits; }

// `a > b ? a : b`: the second where one is NaN or both are zero.
DSC_INLINE Floats larger(Floats a, Floats b) {
#if defined(DSC_AVX512)
    return _mm512_max_ps(a, b);
#elif defined(DSC_AVX2)
    return _mm256_max_ps(a, b);
#elif defined(DSC_SSE2)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

DSC_INLINE Floats smaller(Floats a, Floats b) {
#if defined(DSC_AVX512)
    return _mm512_min_ps(a, b);
#elif defined(DSC_AVX2)
    return _mm256_min_ps(a, b);
#elif defined(DSC_SSE2)
    return _mm_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

// a b + c, rounded once where the CPU can (kFuses).
#if defined(DSC_AVX512) || defined(DSC_AVX2)
constexpr bool kFuses = true;
#else
constexpr bool kFuses = false;
#endif
DSC_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(DSC_AVX512)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(DSC_AVX2)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// NaN stays NaN, as in math::clamp.
DSC_INLINE Floats clamp(Floats value, Floats low, Floats high) { return smaller(high, larger(low, value)); }

DSC_INLINE Ints larger(Ints a, Ints b) {
#if defined(DSC_AVX512)
    return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(DSC_AVX2)
    return (Ints)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    return a > b ? a : b;
#endif
}

DSC_INLINE Floats round_half_even(Floats value) {
#if defined(DSC_AVX512)
    return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(DSC_AVX2)
    return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Ints bits = bits_of(value);
    const Floats magnitude = floats_of(bits & static_cast<int32_t>(math::kMagnitudeBits));
    const Floats rounded = (magnitude + 0x1p23f) - 0x1p23f;
    return floats_of(bits_of(rounded) | (bits & INT32_MIN));
#endif
}

// Bit i is the sign of lane i.
DSC_INLINE uint32_t sign_bits(Ints value) {
#if defined(DSC_AVX512)
    return _mm512_movepi32_mask((__m512i)value);
#elif defined(DSC_AVX2)
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)value));
#elif defined(DSC_SSE2)
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)value));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; i++) bits |= (static_cast<uint32_t>(value[i]) >> 31) << i;
    return bits;
#endif
}

template <class V>
DSC_INLINE auto largest_of(V value) {
    auto best = value[0];
    for (int i = 1; i < kLanes; i++) best = value[i] > best ? value[i] : best;
    return best;
}

// By halves: for a row of a few hundred values, lane after lane would take longer than all before it.
DSC_INLINE int32_t largest_of(Ints value) {
    Ints other;
    for (int i = 0; i < kLanes; i++) other[i] = i;
#pragma GCC unroll 8
    for (int half = kLanes / 2; half > 0; half /= 2) value = larger(value, __builtin_shuffle(value, other + half));
    return value[0];
}

template <class V>
DSC_INLINE auto least_of(V value) {
    auto best = value[0];
    for (int i = 1; i < kLanes; i++) best = value[i] < best ? value[i] : best;
    return best;
}

// --- elements of any float type, read as fp32 and written back rounded ---------------------------------------------

struct Fp32 {
    using Stored = float;
    static constexpr float kLargest = math::kLargestFloat;
    static DSC_INLINE Floats load(const float* from) { return load_as<Floats>(from); }
    static DSC_INLINE void save(float* to, Floats value) { store(to, value); }
    // Of a value that is not Inf, nor a NaN with bits that this format cannot hold.
    static DSC_INLINE void save_tame(float* to, Floats value) { store(to, value); }
    static DSC_INLINE float widen(float value) { return value; }
};

struct Bf16 {
    using Stored = uint16_t;
    static constexpr float kLargest = math::kLargestBf16;
    static DSC_INLINE Floats load(const uint16_t* from) {
#if defined(DSC_AVX512)
        return floats_of((Ints)_mm512_cvtepu16_epi32(load_as<__m256i>(from)) << 16);
#elif defined(DSC_AVX2)
        return floats_of((Ints)_mm256_cvtepu16_epi32(load_as<__m128i>(from)) << 16);
#else
        return floats_of(__builtin_convertvector(load_as<Shorts>(from), Ints) << 16);
#endif
    }
    static DSC_INLINE void save(uint16_t* to, Floats value) {
        const Ints is_nan = (Ints)(value != value);
        store_upper_halves(to, (rounded_in_upper_half(value) & ~is_nan) | (is_nan & 0x7fc00000));
    }
    static DSC_INLINE void save_tame(uint16_t* to, Floats value) {
        store_upper_halves(to, rounded_in_upper_half(value));
    }
    static DSC_INLINE float widen(uint16_t value) { return math::float_of_bf16(value); }
    // Of a tame value; the lower half is of no meaning.
    static DSC_INLINE Ints rounded_in_upper_half(Floats value) {
        const Ints bits = bits_of(value);
        return bits + 0x7fff + ((bits >> 16) & 1);
    }

private:
    static DSC_INLINE void store_upper_halves(uint16_t* to, Ints bits) {
        const Ints result = (bits >> 16) & 0xffff;
#if defined(DSC_AVX512)
        store(to, _mm512_cvtepi32_epi16((__m512i)result));
#elif defined(DSC_AVX2)
        const auto all = (__m256i)result;
        store(to, _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
        store(to, __builtin_convertvector(result, Shorts));
#endif
    }
};

struct Fp16 {
    using Stored = uint16_t;
    static constexpr float kLargest = math::kLargestFp16;
    static DSC_INLINE Floats load(const uint16_t* from) {
#if defined(DSC_AVX512)
        return _mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(DSC_AVX2)
        return _mm256_cvtph_ps(load_as<__m128i>(from));
#else
        Floats value;
        for (int i = 0; i < kLanes; i++) value[i] = math::float_of_fp16(from[i]);
        return value;
#endif
    }
    static DSC_INLINE void save(uint16_t* to, Floats value) {
#if defined(DSC_AVX512)
        store(to, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(DSC_AVX2)
        store(to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
        for (int i = 0; i < kLanes; i++) to[i] = math::fp16_of_float(value[i]);
#endif
    }
    static DSC_INLINE void save_tame(uint16_t* to, Floats value) { save(to, value); }
    static DSC_INLINE float widen(uint16_t value) { return math::float_of_fp16(value); }
};

struct Fp64 {
    using Stored = double;
    static DSC_INLINE Floats load(const double* from) {
        Floats value;
        for (int i = 0; i < kLanes; i++) value[i] = static_cast<float>(from[i]);
        return value;
    }
    static DSC_INLINE float widen(double value) { return static_cast<float>(value); }
};

// --- bits ----------------------------------------------------------------------------------------------------------

// Appends bits to a buffer; what precedes `bit` in its first byte is kept, unused bits of the last byte are zero.
class BitWriter {
public:
    DSC_INLINE BitWriter(uint8_t* buffer, int64_t bit)
        : next_(buffer + bit / 8), pending_(0), count_(static_cast<int>(bit % 8)) {
        if (count_) pending_ = *next_ & ((1u << count_) - 1u);
    }
    // `count` up to 32; bits above it are zero.
    DSC_INLINE void push(uint32_t bits, int count) {
        pending_ |= static_cast<uint64_t>(bits) << count_;
        count_ += count;
        if (count_ >= 32) {
            const uint32_t full = static_cast<uint32_t>(pending_);
            memcpy(next_, &full, sizeof full);
            next_ += 4;
            pending_ >>= 32;
            count_ -= 32;
        }
    }
    DSC_INLINE void finish() {
        for (; count_ > 0; count_ -= 8, pending_ >>= 8) *next_++ = static_cast<uint8_t>(pending_);
    }

private:
    uint8_t* next_;
    uint64_t pending_;
    int count_;
};

}  // namespace
}  // namespace ds_compress::cpu
