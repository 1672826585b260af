// Fake quantization of single values: the range of a row, its scale and offset, and what becomes of a vector.
#pragma once

#include "grid.cuh"

namespace ds_compress::elementwise {

struct QuantRange {
    float min, max;
    float steps;
};

// --- ranges --------------------------------------------------------------------------------------------------------

/// What values span: their largest magnitude, or the least and the greatest. NaN wins.
template <bool symmetric>
struct Span;

template <>
struct Span<true> {
    float largest = 0.0f;

    DSC_DEVICE void add(float value) { largest = larger(largest, fabsf(value)); }
    DSC_DEVICE math::ScaleAndOffset range(int64_t, const math::Divisor& steps) const {
        if (math::bits_of(largest) >= math::kInfinityBits) return {math::float_of(math::kNanBits), 0.0f};
        const float scale = math::scale_or_zero(largest, steps);
        return {scale == 0.0f ? math::float_of(math::kSmallestScaleBits) : scale, 0.0f};
    }
};

template <>
struct Span<false> {
    float lowest = math::float_of(math::kInfinityBits), highest = -math::float_of(math::kInfinityBits);

    DSC_DEVICE void add(float value) {
        lowest = smaller(lowest, value);
        highest = larger(highest, value);
    }
    DSC_DEVICE math::ScaleAndOffset range(int64_t columns, const math::Divisor& steps) const {
        const float not_a_number = math::float_of(math::kNanBits), smallest = math::float_of(math::kSmallestScaleBits);
        if (columns == 0) return {smallest, 0.0f};
        if (!(fabsf(lowest) <= math::kLargestFloat && fabsf(highest) <= math::kLargestFloat))
            return {not_a_number, not_a_number};
        const float low = math::add(lowest, 0.0f);  // of the two zeros, one
        float span = math::subtract(highest, low);
        const bool overflows = span > math::kLargestFloat;
        if (overflows)
            span = math::subtract(math::multiply(highest, math::kShrink), math::multiply(low, math::kShrink));
        float width = math::scale_or_zero(span, steps);
        if (width == 0.0f) return {smallest, low};
        if (overflows) width = math::multiply(width, math::kGrow);
        if (width > math::kLargestFloat) return {not_a_number, not_a_number};
        // A zero has the sign of what it was.
        const float steps_below = math::with_sign_of(math::quotient(low, math::divisor_of(width)), low);
        const float offset = math::multiply(math::round_half_even(steps_below), width);
        return {width, math::clamp(offset, -math::kLargestFloat, math::kLargestFloat)};
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

// --- values --------------------------------------------------------------------------------------------------------

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

/// A row's range as its values are worked on: at a quarter of their size where they are extreme (see math.h).
struct Working {
    math::ScaleAndOffset range;
    float shrink, limit;
    math::Divisor divisor;
};

template <class T>
DSC_DEVICE Working working(math::ScaleAndOffset range) {
    if (!math::is_extreme(range, Largest<T>::value)) return {range, 1.0f, 0.0f, math::divisor_of(range.scale)};
    range = {math::multiply(range.scale, math::kShrink), math::multiply(range.offset, math::kShrink)};
    return {range, math::kShrink, math::multiply(Largest<T>::value, math::kShrink), math::divisor_of(range.scale)};
}

DSC_DEVICE bool is_unclipped(float q, const QuantRange& quant) { return quant.min <= q && q <= quant.max; }

/// The quantized value before it is clamped.
template <bool symmetric>
DSC_DEVICE float rounded(float value, const Working& work) {
    value = math::multiply(value, work.shrink);
    if (!symmetric) value = math::subtract(value, work.range.offset);
    return math::round_half_even(math::any_quotient(value, work.divisor));
}

template <bool symmetric>
DSC_DEVICE float read_back(float q, const Working& work, const QuantRange& quant) {
    float value = math::multiply(math::clamp(q, quant.min, quant.max), work.range.scale);
    if (!symmetric) value = math::add(value, work.range.offset);
    if (work.limit > 0.0f) value = math::multiply(math::clamp(value, -work.limit, work.limit), math::kGrow);
    return value;
}

/// Quantizes a vector by ranges that are given; whether each element is kept, as bits.
template <bool symmetric, class T>
DSC_DEVICE unsigned quantize_vector(Vector<T>& vector, const Working& work, const QuantRange& quant, bool wants_mask) {
    constexpr int width = Vector<T>::count;
    float values[width];
    unpack(vector, values);
    unsigned mask = 0;
#pragma unroll
    for (int j = 0; j < width; j++) {
        const float q = rounded<symmetric>(values[j], work);
        if (wants_mask && is_unclipped(q, quant)) mask |= 1u << j;
        values[j] = read_back<symmetric>(q, work, quant);
    }
    vector = pack<T>(values);
    return mask;
}

/// The same by the measured range of the row: no value is far outside of it, and in a row with a NaN or Inf the scale
/// is NaN, and so is all that it is multiplied by. What most rows do not need is asked for once a vector.
template <bool symmetric, class T>
DSC_DEVICE unsigned quantize_measured(Vector<T>& vector, const Working& work, const QuantRange& quant,
                                      bool wants_mask) {
    constexpr int width = Vector<T>::count;
    float values[width];
    unpack(vector, values);
    if (work.shrink != 1.0f) {
#pragma unroll
        for (int j = 0; j < width; j++) values[j] = math::multiply(values[j], work.shrink);
    }
    if (!symmetric) {
#pragma unroll
        for (int j = 0; j < width; j++) values[j] = math::subtract(values[j], work.range.offset);
    }
    float lifted[width];
#pragma unroll
    for (int j = 0; j < width; j++) lifted[j] = values[j];
    if (work.divisor.lift != 1.0f) {
#pragma unroll
        for (int j = 0; j < width; j++) lifted[j] = math::multiply(values[j], work.divisor.lift);
    }
    unsigned mask = 0;
#pragma unroll
    for (int j = 0; j < width; j++) {
        const float whole =
            math::subtract(math::add(math::lifted_quotient(lifted[j], work.divisor), math::kRound), math::kRound);
        // A zero has the sign of what it was.
        const float q = math::float_of(math::bits_of(whole) | (math::bits_of(values[j]) & ~math::kMagnitudeBits));
        if (wants_mask && is_unclipped(q, quant)) mask |= 1u << j;
        const float above = q < quant.min ? quant.min : q;  // fmaxf would make +0 of -0
        values[j] = math::multiply(fminf(above, quant.max), work.range.scale);
        if (!symmetric) values[j] = math::add(values[j], work.range.offset);
    }
    if (work.limit > 0.0f) {
#pragma unroll
        for (int j = 0; j < width; j++)
            values[j] = math::multiply(math::clamp(values[j], -work.limit, work.limit), math::kGrow);
    }
    vector = pack<T>(values);
    return mask;
}

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
