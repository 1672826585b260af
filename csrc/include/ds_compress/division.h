// Divisions of many numbers by one, for CUDA kernels that hold values in registers: the division of the compiler calls
// a subroutine, around which all of them would be spilled, and costs several times as much. Where it matters, the same
// bits as `math::divide` gives; tests/native/test_division.py tries it.
#pragma once

#include "ds_compress/math.h"

namespace ds_compress::math {

DSC_HD float with_sign_of(float magnitude, float sign) {
    return float_of((bits_of(magnitude) & kMagnitudeBits) | (bits_of(sign) & ~kMagnitudeBits));
}

// The reciprocal of a positive value in two parts. Tiny and huge divisors are lifted, with what they divide, to where
// nothing is lost; of a negative one, `lift` has the sign.
struct Divisor {
    float lift, value, high, low;
};

// 1 / value to the nearest, for 2^-100 <= value <= 2^100: Newton's iteration from an estimate by the exponent. It ends
// one bit short for one mantissa, that of all ones.
DSC_HD float reciprocal(float value) {
    const uint32_t bits = bits_of(value);
    float result = float_of(0x7ef311c3u - bits);
#pragma unroll
    for (int i = 0; i < 5; i++) result = fused(fused(-value, result, 1.0f), result, result);
    return (bits & 0x7fffffu) == 0x7fffffu ? float_of(bits_of(result) + 1) : result;
}

// By zero everything becomes Inf, by Inf zero, by NaN NaN.
DSC_HD Divisor divisor_of(float value) {
    const uint32_t bits = bits_of(value) & kMagnitudeBits, sign = bits_of(value) ^ bits;
    const float one = float_of(0x3f800000u | sign);
    if (bits == 0) return {one, 0.0f, float_of(kInfinityBits), 0.0f};
    if (bits == kInfinityBits) return {one, 0.0f, 0.0f, 0.0f};
    const float lift = bits < 0x20800000u ? 0x1p64f : bits > 0x5f000000u ? 0x1p-64f : 1.0f;
    const float lifted = multiply(float_of(bits), lift);
    const float high = reciprocal(lifted);
    return {multiply(lift, one), lifted, high, multiply(fused(-lifted, high, 1.0f), high)};
}

// Divides anything finite to 0.
DSC_HD Divisor divisor_to_nothing() { return {1.0f, 0.0f, 0.0f, 0.0f}; }

// The nearest float to value / d, where that is normal and value is neither much less than d nor Inf: the estimate is
// off by little more than half an ulp, and its exact remainder times the nearest reciprocal mends it (Markstein).
// Quotients below 1/4 may be off in their last bits, as nothing here but rounding to integers comes after.
DSC_HD float lifted_quotient(float value, const Divisor& d) {
    const float estimate = fused(value, d.high, multiply(value, d.low));
    return fused(fused(-estimate, d.value, value), d.high, estimate);
}

DSC_HD float quotient(float value, const Divisor& d) { return lifted_quotient(multiply(value, d.lift), d); }

// The same for any lifted value, but for the sign of a zero; from 2^22 on it is only about right, Inf and NaN stay.
DSC_HD float any_lifted_quotient(float value, const Divisor& d) {
    const float rough = multiply(value, d.high);
    const float better = lifted_quotient(value, d);
    return float_of(bits_of(rough) & kMagnitudeBits) < 0x1p22f ? better : rough;
}

DSC_HD float any_quotient(float value, const Divisor& d) {
    value = multiply(value, d.lift);
    return with_sign_of(any_lifted_quotient(value, d), value);
}

// value / steps of a finite value >= 0, or 0 where that is below 2^-126; `steps` is 1 to 2^24.
DSC_HD float scale_or_zero(float value, const Divisor& steps) {
    // What rounds to less than 2^-126 among the subnormal floats lies below 2^-126 - 2^-150.
    if (fused(-0x1.fffffep-63f, steps.value, multiply(value, 0x1p64f)) < 0.0f) return 0.0f;
    const bool is_small = value < 0x1p-30f;
    const float scale = quotient(is_small ? multiply(value, 0x1p64f) : value, steps);
    return is_small ? multiply(scale, 0x1p-64f) : scale;
}

}  // namespace ds_compress::math
