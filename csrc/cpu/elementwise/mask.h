// Bit-packed masks on elements of 2, 4 or 8 bytes. To be included in a .cpp of one instruction set.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ds_compress::cpu {
namespace {

// Integers in which a bit of the mask is spread over a lane, and the bit that each lane looks at.
template <class T>
struct Lanes;
template <>
struct Lanes<uint16_t> {
    static constexpr int count = kLanes == 4 ? 8 : 16;  // 16 bits fit into a lane, no more
    using Vector = uint16_t __attribute__((vector_size(2 * count)));
};
template <>
struct Lanes<uint32_t> {
    static constexpr int count = kLanes;
    using Vector = uint32_t __attribute__((vector_size(4 * count)));
};
template <>
struct Lanes<uint64_t> {
    static constexpr int count = kLanes / 2;
    using Vector = uint64_t __attribute__((vector_size(8 * count)));
};

// The lanes of vector number `index` look at successive bits of a T; so does every vector that follows, from the start
// of the next T when this one is used up.
template <class T>
DSC_INLINE typename Lanes<T>::Vector looked_at(int index) {
    constexpr int count = Lanes<T>::count;
    typename Lanes<T>::Vector bits{};
    for (int i = 0; i < count; i++) bits[i] = static_cast<T>(T{1} << (index * count % (8 * sizeof(T)) + i));
    return bits;
}

template <class V>
DSC_INLINE bool any_bit(V value) {
#if defined(DSC_AVX512)
    if constexpr (sizeof(V) == 64)
        return _mm512_test_epi64_mask((__m512i)value, (__m512i)value) != 0;
    else
        return !_mm256_testz_si256((__m256i)value, (__m256i)value);
#elif defined(DSC_AVX2)
    return !_mm256_testz_si256((__m256i)value, (__m256i)value);
#else
    uint64_t words[sizeof(V) / 8], any = 0;
    memcpy(words, &value, sizeof value);
    for (uint64_t word : words) any |= word;
    return any != 0;
#endif
}

// The 64 bits of the mask from `bit` on; needs 9 bytes from there.
DSC_INLINE uint64_t window(const uint8_t* packed, int64_t bit) {
    const uint8_t* from = packed + (bit >> 3);
    const int shift = static_cast<int>(bit & 7);
    const uint64_t low = load_as<uint64_t>(from);
    // In two steps, because a shift by 64 has no meaning.
    return (low >> shift) | (static_cast<uint64_t>(from[8]) << 1 << (63 - shift));
}

// How many elements can be served by `window`, in whole steps of 64.
DSC_INLINE int64_t whole_windows(Mask mask, int64_t count) {
    const int64_t readable = 8 * (mask.bytes - 8) - mask.bit;
    const int64_t limit = readable < count ? readable : count;
    return limit < 64 ? 0 : limit / 64 * 64;
}

DSC_INLINE bool bit_at(Mask mask, int64_t i) {
    const int64_t bit = mask.bit + i;
    return (mask.packed[bit >> 3] >> (bit & 7)) & 1;
}

template <class T, bool kFill>
DSC_INLINE void apply_64(T* data, uint64_t bits, T fill) {
    using V = typename Lanes<T>::Vector;
    constexpr int count = Lanes<T>::count;
    constexpr int kBatch = count * 4 < 64 ? count * 4 : 64;  // few enough vectors for the registers
#pragma GCC unroll 8
    for (int begin = 0; begin < 64; begin += kBatch) {
        V values[kBatch / count];
        V lost{};
#pragma GCC unroll 4
        for (int i = 0; i < kBatch / count; i++) {
            const int first = begin + i * count;
            const V spread = static_cast<T>(bits >> (first / (8 * sizeof(T)) * (8 * sizeof(T)))) - V{};
            const V look = looked_at<T>(first / count);
            const V kept = (V)((spread & look) == look);
            const V before = load_as<V>(data + first);
            values[i] = before & kept;
            if constexpr (kFill) values[i] |= ~kept & fill;
            lost |= kFill ? before ^ values[i] : before & ~kept;
        }
        // Lines in which nothing changes, as in a step after the first under one mask, are not written back.
        if (!any_bit(lost)) continue;
#pragma GCC unroll 4
        for (int i = 0; i < kBatch / count; i++) store(data + begin + i * count, values[i]);
    }
}

// Not inlined, so that a look at the machine code finds it.
template <class T, bool kFill>
__attribute__((noinline)) void apply(T* data, int64_t count, Mask mask, T fill) {
    const int64_t whole = whole_windows(mask, count);
    for (int64_t i = 0; i < whole; i += 64) apply_64<T, kFill>(data + i, window(mask.packed, mask.bit + i), fill);
    for (int64_t i = whole; i < count; i++)
        if (!bit_at(mask, i)) memcpy(data + i, &fill, sizeof fill);
}

template <bool kFill>
void apply_sized(void* data, int size, int64_t count, Mask mask, uint64_t fill) {
    switch (size) {
        case 2:
            return apply<uint16_t, kFill>(static_cast<uint16_t*>(data), count, mask, static_cast<uint16_t>(fill));
        case 4:
            return apply<uint32_t, kFill>(static_cast<uint32_t*>(data), count, mask, static_cast<uint32_t>(fill));
        default:
            return apply<uint64_t, kFill>(static_cast<uint64_t*>(data), count, mask, fill);
    }
}

void mask_apply(void* data, int size, int64_t count, Mask mask, uint64_t fill) {
    if (fill == 0)
        apply_sized<false>(data, size, count, mask, 0);
    else
        apply_sized<true>(data, size, count, mask, fill);
}

DSC_INLINE uint32_t non_zero_bytes_32(const uint8_t* from) {
#if defined(DSC_AVX512) || defined(DSC_AVX2)
    const __m256i zero = _mm256_cmpeq_epi8(load_as<__m256i>(from), _mm256_setzero_si256());
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(zero));
#elif defined(DSC_SSE2)
    const __m128i low = _mm_cmpeq_epi8(load_as<__m128i>(from), _mm_setzero_si128());
    const __m128i high = _mm_cmpeq_epi8(load_as<__m128i>(from + 16), _mm_setzero_si128());
    return ~(static_cast<uint32_t>(_mm_movemask_epi8(low)) | static_cast<uint32_t>(_mm_movemask_epi8(high)) << 16);
#else
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= static_cast<uint32_t>(from[i] != 0) << i;
    return bits;
#endif
}

void mask_pack(const uint8_t* mask, int64_t count, uint8_t* packed) {
    BitWriter writer(packed, 0);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) writer.push(non_zero_bytes_32(mask + i), 32);
    for (; i < count; i++) writer.push(mask[i] != 0, 1);
    writer.finish();
}

void mask_unpack(Mask mask, int64_t count, uint8_t* to) {
    const int64_t whole = whole_windows(mask, count);
    for (int64_t i = 0; i < whole; i += 64) {
        const uint64_t bits = window(mask.packed, mask.bit + i);
        for (int j = 0; j < 8; j++) {
            // Eight copies of a byte; each keeps its own bit, which is then moved to the bottom.
            const uint64_t spread = ((bits >> (8 * j)) & 0xff) * 0x0101010101010101u & 0x8040201008040201u;
            store(to + i + 8 * j, ((spread + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u);
        }
    }
    for (int64_t i = whole; i < count; i++) to[i] = bit_at(mask, i);
}

}  // namespace
}  // namespace ds_compress::cpu
