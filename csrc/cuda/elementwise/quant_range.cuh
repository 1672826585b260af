// Fake quantization of single values to integers: the range of a row, its scale and offset, and what becomes of a
// vector.
#pragma once

#include "span.cuh"

namespace ds_compress::elementwise {

struct QuantRange {
    float min, max;
    float steps;
};

// --- ranges --------------------------------------------------------------------------------------------------------

DSC_DEVICE math::ScaleAndOffset range_of(const Span<true>& span, int64_t, const math::Divisor& steps) {
    if (math::bits_of(span.largest) >= math::kInfinityBits) return {math::float_of(math::kNanBits), 0.0f};
    const float scale = math::scale_or_zero(span.largest, steps);
    return {scale == 0.0f ? math::float_of(math::kSmallestScaleBits) : scale, 0.0f};
}

DSC_DEVICE math::ScaleAndOffset range_of(const Span<false>& ends, int64_t columns, const math::Divisor& steps) {
    const float not_a_number = math::float_of(math::kNanBits), smallest = math::float_of(math::kSmallestScaleBits);
    if (columns == 0) return {smallest, 0.0f};
    if (!(fabsf(ends.lowest) <= math::kLargestFloat && fabsf(ends.highest) <= math::kLargestFloat))
        return {not_a_number, not_a_number};
    const float low = math::add(ends.lowest, 0.0f);  // of the two zeros, one
    float span = math::subtract(ends.highest, low);
    const bool overflows = span > math::kLargestFloat;
    if (overflows)
        span = math::subtract(math::multiply(ends.highest, math::kShrink), math::multiply(low, math::kShrink));
    float width = math::scale_or_zero(span, steps);
    if (width == 0.0f) return {smallest, low};
    if (overflows) width = math::multiply(width, math::kGrow);
    if (width > math::kLargestFloat) return {not_a_number, not_a_number};
    // A zero has the sign of what it was.
    const float steps_below = math::with_sign_of(math::quotient(low, math::divisor_of(width)), low);
    const float offset = math::multiply(math::round_half_even(steps_below), width);
    return {width, math::clamp(offset, -math::kLargestFloat, math::kLargestFloat)};
}

// --- values --------------------------------------------------------------------------------------------------------

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

/// Rows of integers. A `Quantizer` of the kernels has all of this: `quantize_measured` is for what the range of was
/// measured, `quantize` for any range; both say of each element whether it is kept, as bits.
template <bool is_symmetric>
struct Integers {
    static constexpr bool symmetric = is_symmetric;
    static constexpr bool has_small_blocks = false;
    QuantRange quant;
    math::Divisor steps;

    DSC_DEVICE math::ScaleAndOffset range(const Span<symmetric>& span, int64_t columns) const {
        return range_of(span, columns, steps);
    }
    template <class T>
    DSC_DEVICE Working working(math::ScaleAndOffset range) const {
        return elementwise::working<T>(range);
    }
    template <class T>
    DSC_DEVICE unsigned quantize(Vector<T>& vector, const Working& work, bool wants_mask) const {
        return quantize_vector<symmetric>(vector, work, quant, wants_mask);
    }
    template <class T>
    DSC_DEVICE unsigned quantize_measured(Vector<T>& vector, const Working& work, bool wants_mask) const {
        return elementwise::quantize_measured<symmetric>(vector, work, quant, wants_mask);
    }
    DSC_DEVICE Quantized quantize_one(float value, const Working& work) const {
        const float q = rounded<symmetric>(value, work);
        return {read_back<symmetric>(q, work, quant), is_unclipped(q, quant)};
    }
};

}  // namespace ds_compress::elementwise
