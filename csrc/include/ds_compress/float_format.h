// Floating-point numbers of 4 to 8 bits and the scales of their blocks, as ds_compress/ops/reference/float_formats.py
// states them. Everything about a format is a number that is known at run time: one kernel serves all formats.
#pragma once

#include "ds_compress/math.h"

namespace ds_compress::math {

enum ScaleKind : int { kScaleFp32 = 0, kScaleE8m0 = 1, kScaleE4m3 = 2 };

// The steps between neighbouring numbers: 2^-mantissa_bits of the power of two below, and of the smallest normal number
// for what is less.
struct FloatSteps {
    uint32_t smallest_bits;  // of the smallest normal number, as fp32
    uint32_t shift;          // (23 - mantissa_bits) << 23: from an exponent to that of the constant that rounds
};

struct FloatFormat {
    FloatSteps steps;
    float largest;
    int scale_kind;
    int largest_exponent;     // that of `largest`
    uint32_t scale_rounding;  // half a step of an amax's bits before its exponent is taken for E8M0
};

constexpr FloatSteps float_steps(int exponent_bits, int mantissa_bits) {
    const int smallest_exponent = 2 - (1 << (exponent_bits - 1));
    return {static_cast<uint32_t>(127 + smallest_exponent) << 23, static_cast<uint32_t>(23 - mantissa_bits) << 23};
}

// The exponent of a positive number, which may be subnormal as a float.
inline int exponent_of(float value) {
    int exponent = -127;
    uint32_t bits = bits_of(value);
    if (bits < kSmallestScaleBits) {
        bits = bits_of(value * 0x1p23f);
        exponent -= 23;
    }
    return exponent + static_cast<int>(bits >> 23);
}

inline FloatFormat float_format(int exponent_bits, int mantissa_bits, float largest, int scale_kind) {
    // With a mantissa of three bits an amax of E4M3 would need as many; compressed_tensors takes one for it.
    const int rounding_bits = exponent_bits == 4 && mantissa_bits == 3 ? 1 : mantissa_bits;
    return {float_steps(exponent_bits, mantissa_bits), largest, scale_kind, exponent_of(largest),
            1u << (23 - rounding_bits - 1)};
}

constexpr FloatSteps kE4m3 = float_steps(4, 3);
constexpr float kLargestE4m3 = 448.0f, kZeroInE4m3 = 0.125f;
constexpr float kScaleOfZeros = 0x1p-23f;
constexpr uint32_t kSmallestE8m0Bits = 0x00400000u;  // 2^-127

// Beyond every `largest`, and far enough from the end of fp32 for the constant that rounds.
constexpr float kBeyondFormats = 0x1p100f;

// The nearest number of an unlimited exponent upwards, half to even, of a value from 0 to 2^100; NaN stays. Next to the
// constant 2^(e + 23 - mantissa_bits), e the exponent of the value, an fp32 number has exactly the steps that are
// wanted, so that adding it rounds and subtracting it is exact.
DSC_HD float round_magnitude(float magnitude, FloatSteps steps) {
    uint32_t exponent = bits_of(magnitude) & kInfinityBits;
    if (exponent < steps.smallest_bits) exponent = steps.smallest_bits;
    const float constant = float_of(exponent + steps.shift);
    return subtract(add(magnitude, constant), constant);
}

// What the quantized numbers of a block are multiplied by, of the bits of its largest magnitude. `global_scale`, which
// is positive, counts for kScaleE4m3 only.
DSC_HD float float_scale(uint32_t largest_bits, const FloatFormat& format, float global_scale) {
    if (largest_bits >= kInfinityBits) return float_of(kNanBits);
    if (format.scale_kind == kScaleE8m0) {
        const int code = static_cast<int>((largest_bits + format.scale_rounding) >> 23) - format.largest_exponent;
        if (code <= 0) return float_of(kSmallestE8m0Bits);
        return float_of(static_cast<uint32_t>(code < 254 ? code : 254) << 23);
    }
    const float scale = divide(float_of(largest_bits), format.largest);
    if (format.scale_kind == kScaleFp32) return scale == 0.0f ? kScaleOfZeros : scale;
    const float wanted = multiply(global_scale, scale);
    const float stored = round_magnitude(kBeyondFormats < wanted ? kBeyondFormats : wanted, kE4m3);
    const float limited = kLargestE4m3 < stored ? kLargestE4m3 : stored;
    return divide(limited == 0.0f ? kZeroInE4m3 : limited, global_scale);
}

// 1 / scale of one of kScaleE8m0, exactly: every such reciprocal is a float, too. NaN stays.
DSC_HD float reciprocal_of_power(float scale) {
    const uint32_t bits = bits_of(scale);
    if (bits > kInfinityBits) return scale;
    const uint32_t reciprocal = (254u << 23) - (bits & kInfinityBits);
    return float_of(reciprocal == 0 ? kSmallestE8m0Bits : reciprocal);
}

}  // namespace ds_compress::math
