// The AVX-512 intrinsics that csrc uses, in plain C++, from their description in Intel's manual (Software Developer's
// Manual, volume 2), so that the source for AVX-512 VNNI runs on any x86-64. Forced in front of a file with -include.
//
// An intrinsic that is used and not defined here fails to compile, for its target flags are not given.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ds_compress/math.h"

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512VNNI__ 1

namespace emulated {

template <class Lane>
struct Lanes {
    Lane lane[64 / sizeof(Lane)];
    template <class V>
    static Lanes of(const V& value) {
        static_assert(sizeof(V) == 64);
        Lanes lanes;
        std::memcpy(lanes.lane, &value, 64);
        return lanes;
    }
    template <class V>
    V as() const {
        V value;
        std::memcpy(&value, lane, 64);
        return value;
    }
};

template <class Lane, class V, class F>
V each(V a, V b, F f) {
    const auto x = Lanes<Lane>::of(a), y = Lanes<Lane>::of(b);
    Lanes<Lane> result;
    for (unsigned i = 0; i < 64 / sizeof(Lane); i++) result.lane[i] = f(x.lane[i], y.lane[i]);
    return result.template as<V>();
}

// VMAXPS, VMINPS: the second operand where one is NaN or both are zero.
inline __m512 max_ps(__m512 a, __m512 b) {
    return each<float>(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline __m512 min_ps(__m512 a, __m512 b) {
    return each<float>(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline __m512i max_epi32(__m512i a, __m512i b) {
    return each<int32_t>(a, b, [](int32_t x, int32_t y) { return x > y ? x : y; });
}
inline __m512i max_epi16(__m512i a, __m512i b) {
    return each<int16_t>(a, b, [](int16_t x, int16_t y) { return x > y ? x : y; });
}
inline __m512i and_si512(__m512i a, __m512i b) {
    return each<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x & y; });
}
inline __m512i srli_epi16(__m512i a, unsigned count) {
    return each<uint16_t>(a, a, [=](uint16_t x, uint16_t) { return static_cast<uint16_t>(x >> count); });
}
// VFMADD: one rounding.
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
    const auto z = Lanes<float>::of(c);
    unsigned i = 0;
    return each<float>(a, b, [&](float x, float y) { return std::fmaf(x, y, z.lane[i++]); });
}
// VRNDSCALEPS to whole numbers, half to even.
inline __m512 round_ps(__m512 a) {
    return each<float>(a, a, [](float x, float) { return std::nearbyintf(x); });
}
// VCVTPS2DQ: half to even; what has no int32 becomes the integer indefinite.
inline __m512i cvtps_epi32(__m512 a) {
    const auto x = Lanes<float>::of(a);
    Lanes<int32_t> result;
    for (int i = 0; i < 16; i++) {
        const float whole = std::nearbyintf(x.lane[i]);
        result.lane[i] = whole >= -0x1p31f && whole < 0x1p31f ? static_cast<int32_t>(whole) : INT32_MIN;
    }
    return result.as<__m512i>();
}
// VCVTTPS2DQ: the same towards zero.
inline __m512i cvttps_epi32(__m512 a) {
    return cvtps_epi32(each<float>(a, a, [](float x, float) { return std::trunc(x); }));
}
// VCVTDQ2PS
inline __m512 cvtepi32_ps(__m512i a) {
    const auto x = Lanes<int32_t>::of(a);
    Lanes<float> result;
    for (int i = 0; i < 16; i++) result.lane[i] = static_cast<float>(x.lane[i]);
    return result.as<__m512>();
}
// VPMOVSXBD
inline __m512i cvtepi8_epi32(__m128i a) {
    int8_t bytes[16];
    std::memcpy(bytes, &a, 16);
    Lanes<int32_t> result;
    for (int i = 0; i < 16; i++) result.lane[i] = bytes[i];
    return result.as<__m512i>();
}
// VPTESTMQ: which lanes of the AND are not zero.
inline uint8_t test_epi64_mask(__m512i a, __m512i b) {
    const auto x = Lanes<uint64_t>::of(a), y = Lanes<uint64_t>::of(b);
    unsigned mask = 0;
    for (int i = 0; i < 8; i++) mask |= ((x.lane[i] & y.lane[i]) != 0 ? 1u : 0u) << i;
    return static_cast<uint8_t>(mask);
}
// VPMOVDB, VPMOVDW: the low byte or word of every lane.
template <class Part, class Result>
Result low_parts(__m512i a) {
    const auto x = Lanes<int32_t>::of(a);
    Part parts[16];
    for (int i = 0; i < 16; i++) parts[i] = static_cast<Part>(x.lane[i]);
    Result result;
    std::memcpy(&result, parts, sizeof result);
    return result;
}
// VPMOVZXWD
inline __m512i cvtepu16_epi32(__m256i a) {
    uint16_t words[16];
    std::memcpy(words, &a, 32);
    Lanes<int32_t> result;
    for (int i = 0; i < 16; i++) result.lane[i] = words[i];
    return result.as<__m512i>();
}
inline __m512 cvtph_ps(__m256i a) {
    uint16_t halves[16];
    std::memcpy(halves, &a, 32);
    Lanes<float> result;
    for (int i = 0; i < 16; i++) result.lane[i] = ds_compress::math::float_of_fp16(halves[i]);
    return result.as<__m512>();
}
inline __m256i cvtps_ph(__m512 a) {
    const auto x = Lanes<float>::of(a);
    uint16_t halves[16];
    for (int i = 0; i < 16; i++) halves[i] = ds_compress::math::fp16_of_float(x.lane[i]);
    __m256i result;
    std::memcpy(&result, halves, 32);
    return result;
}
template <class Lane>
__m512i broadcast(Lane value) {
    Lanes<Lane> result;
    for (Lane& lane : result.lane) lane = value;
    return result.template as<__m512i>();
}
inline __m512i load(const void* from) {
    __m512i value;
    std::memcpy(&value, from, 64);
    return value;
}
inline void store(void* to, __m512i value) { std::memcpy(to, &value, 64); }

// VPMOVD2M: the signs of the lanes.
inline uint32_t movepi32_mask(__m512i a) {
    const auto x = Lanes<int32_t>::of(a);
    uint32_t mask = 0;
    for (int i = 0; i < 16; i++) mask |= (x.lane[i] < 0 ? 1u : 0u) << i;
    return mask;
}

// VPMOVW2M: those of 32 lanes.
inline uint32_t movepi16_mask(__m512i a) {
    const auto x = Lanes<int16_t>::of(a);
    uint32_t mask = 0;
    for (int i = 0; i < 32; i++) mask |= (x.lane[i] < 0 ? 1u : 0u) << i;
    return mask;
}

// VPDPBUSD: four products of unsigned bytes of `a` and signed bytes of `b`, added to the lane modulo 2^32.
inline void dpbusd(__m512i& sum, __m512i a, __m512i b) {
    auto lanes = Lanes<uint32_t>::of(sum);
    const auto x = Lanes<uint8_t>::of(a);
    const auto y = Lanes<int8_t>::of(b);
    for (int i = 0; i < 64; i++) lanes.lane[i / 4] += static_cast<uint32_t>(x.lane[i] * y.lane[i]);
    sum = lanes.as<__m512i>();
}

// VPADDD: modulo 2^32.
inline __m512i add_epi32(__m512i a, __m512i b) {
    return each<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
// VBROADCASTI32X4: 16 bytes, four times.
inline __m512i broadcast_i32x4(__m128i a) {
    __m512i result;
    for (int i = 0; i < 4; i++) std::memcpy(reinterpret_cast<char*>(&result) + 16 * i, &a, 16);
    return result;
}
// VPUNPCK[LH][DQ|QDQ]: the lower or upper half of each 16 bytes of `a` and of `b`, lane by lane in turn.
template <class Lane, int kHalf>
__m512i unpack(__m512i a, __m512i b) {
    constexpr int kLanes = 16 / sizeof(Lane);
    const auto x = Lanes<Lane>::of(a), y = Lanes<Lane>::of(b);
    Lanes<Lane> result;
    for (int quarter = 0; quarter < 4 * kLanes; quarter += kLanes)
        for (int i = 0; i < kLanes / 2; i++) {
            result.lane[quarter + 2 * i] = x.lane[quarter + kHalf * kLanes / 2 + i];
            result.lane[quarter + 2 * i + 1] = y.lane[quarter + kHalf * kLanes / 2 + i];
        }
    return result.template as<__m512i>();
}
// VPERMD: the lanes of `a` that `index` names.
inline __m512i permutexvar_epi32(__m512i index, __m512i a) {
    const auto which = Lanes<uint32_t>::of(index), x = Lanes<uint32_t>::of(a);
    Lanes<uint32_t> result;
    for (int i = 0; i < 16; i++) result.lane[i] = x.lane[which.lane[i] % 16];
    return result.as<__m512i>();
}
template <class... Numbers>
__m512i setr_epi32(Numbers... numbers) {
    static_assert(sizeof...(Numbers) == 16);
    return Lanes<int32_t>{{numbers...}}.template as<__m512i>();
}

}  // namespace emulated

#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_max_epi32 emulated::max_epi32
#define _mm512_max_epi16 emulated::max_epi16
#define _mm512_and_si512 emulated::and_si512
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_fmadd_ps emulated::fmadd_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(a, mode) emulated::round_ps(a)
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvttps_epi32 emulated::cvttps_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_test_epi64_mask emulated::test_epi64_mask
#define _mm512_cvtepi32_epi8 (emulated::low_parts<uint8_t, __m128i>)
#define _mm512_cvtepi32_epi16 (emulated::low_parts<uint16_t, __m256i>)
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, mode) emulated::cvtps_ph(a)
#define _mm512_set1_epi32 emulated::broadcast<int32_t>
#define _mm512_set1_epi8 emulated::broadcast<int8_t>
#define _mm512_loadu_si512 emulated::load
#define _mm512_storeu_si512 emulated::store
#define _mm512_load_si512 emulated::load
#define _mm512_setzero_si512() emulated::broadcast<int32_t>(0)
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_broadcast_i32x4 emulated::broadcast_i32x4
#define _mm512_unpacklo_epi32 (emulated::unpack<uint32_t, 0>)
#define _mm512_unpackhi_epi32 (emulated::unpack<uint32_t, 1>)
#define _mm512_unpacklo_epi64 (emulated::unpack<uint64_t, 0>)
#define _mm512_unpackhi_epi64 (emulated::unpack<uint64_t, 1>)
#define _mm512_permutexvar_epi32 emulated::permutexvar_epi32
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated::setr_epi32
#define _mm512_movepi32_mask emulated::movepi32_mask
#define _mm512_movepi16_mask emulated::movepi16_mask
#define DSC_VPDPBUSD(sum, a, b) emulated::dpbusd(sum, a, b)
