// What the values of a row span, over the threads that share it, and what else rows have in common whatever they are
// quantized to.
#pragma once

#include "grid.cuh"

namespace ds_compress::elementwise {

/// What values span: their largest magnitude, or the least and the greatest. NaN wins.
template <bool symmetric>
struct Span;

template <>
struct Span<true> {
    float largest = 0.0f;

    DSC_DEVICE void add(float value) { largest = larger(largest, fabsf(value)); }
};

template <>
struct Span<false> {
    float lowest = math::float_of(math::kInfinityBits), highest = -math::float_of(math::kInfinityBits);

    DSC_DEVICE void add(float value) {
        lowest = smaller(lowest, value);
        highest = larger(highest, value);
    }
};

/// Integers in the order of floats, and back: its own inverse. Positive NaNs are the largest.
DSC_DEVICE int ordered(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
DSC_DEVICE int ordered(float value) { return ordered(static_cast<int>(math::bits_of(value))); }
DSC_DEVICE float unordered(int key) { return math::float_of(static_cast<uint32_t>(ordered(key))); }

/// The largest key among `sharing` (up to 32) neighbouring lanes.
template <int sharing>
DSC_DEVICE unsigned largest_key(unsigned key) {
    if constexpr (sharing >= 32) {
        return __reduce_max_sync(~0u, key);
    } else {
#pragma unroll
        for (int distance = sharing / 2; distance > 0; distance /= 2)
            key = max(key, __shfl_xor_sync(~0u, key, distance));
        return key;
    }
}

/// The span over lanes of a warp. A NaN is in both ends, and found in the highest.
template <int sharing, bool symmetric>
DSC_DEVICE Span<symmetric> join_warp(const Span<symmetric>& span) {
    if constexpr (symmetric) {
        return {math::float_of(largest_key<sharing>(math::bits_of(span.largest)))};
    } else {
        // With the sign bit turned, unsigned integers have the order of signed ones; all bits turned, the reverse of
        // it.
        constexpr unsigned turn = 0x80000000u, reverse = 0x7fffffffu;
        const unsigned low = largest_key<sharing>(static_cast<unsigned>(ordered(span.lowest)) ^ reverse) ^ reverse;
        const unsigned high = largest_key<sharing>(static_cast<unsigned>(ordered(span.highest)) ^ turn) ^ turn;
        return {unordered(static_cast<int>(low)), unordered(static_cast<int>(high))};
    }
}

DSC_DEVICE Span<true> both(const Span<true>& a, const Span<true>& b) { return {larger(a.largest, b.largest)}; }
DSC_DEVICE Span<false> both(const Span<false>& a, const Span<false>& b) {
    return {smaller(a.lowest, b.lowest), larger(a.highest, b.highest)};
}

/// The span over the threads that share a row: lanes of a warp, or the whole block, to which all threads then come.
template <int sharing, bool symmetric>
DSC_DEVICE Span<symmetric> join(Span<symmetric> span) {
    span = join_warp<sharing>(span);
    if constexpr (sharing > 32) {
        DSC_SHARED(Span<symmetric>, parts, sharing / 32);
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = span;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < sharing / 32; i++) span = both(span, parts[i]);
    }
    return span;
}

/// A value as it reads back, and whether it did not have to be clipped.
struct Quantized {
    float value;
    bool is_inside;
};

/// The largest finite value of a dtype.
template <class T>
struct Largest;
template <>
struct Largest<float> {
    static constexpr float value = math::kLargestFloat;
};
template <>
struct Largest<__nv_bfloat16> {
    static constexpr float value = math::kLargestBf16;
};
template <>
struct Largest<__half> {
    static constexpr float value = math::kLargestFp16;
};

/// Stores the bits of vector `i` of the matrix, where the rows are whole bytes of them. Lanes 2 i and 2 i + 1 have
/// neighbouring vectors, or neither has one; all lanes of the warp come here.
template <int width>
DSC_DEVICE void store_mask(uint8_t* mask, int64_t i, bool exists, unsigned bits) {
    if constexpr (width == 4) {
        bits |= __shfl_xor_sync(~0u, bits, 1) << 4;
        exists = exists && threadIdx.x % 2 == 0;
        i /= 2;
    }
    if (exists) mask[i] = static_cast<uint8_t>(bits);
}

}  // namespace ds_compress::elementwise
