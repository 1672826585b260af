// The arithmetic that CPU and CUDA kernels share, so that both round alike, bit for bit.
//
// Everything is fp32 with true divisions, half to even, no contraction to FMA and subnormals kept; what was computed is
// cast to the dtype of the tensor last. All functions have internal linkage: a copy that was compiled for AVX-512 must
// never be linked into the code for older CPUs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DSC_HD static __host__ __device__ __forceinline__
#else
#define DSC_HD __attribute__((unused, always_inline)) static inline
#endif

namespace ds_compress::math {

constexpr uint32_t kMagnitudeBits = 0x7fffffffu;  // all but the sign
constexpr uint32_t kInfinityBits = 0x7f800000u;   // magnitudes from here on are Inf or NaN
constexpr uint32_t kNanBits = 0x7fc00000u;
constexpr float kLargestFloat = 0x1.fffffep127f, kLargestBf16 = 0x1.fep127f, kLargestFp16 = 65504.0f;
constexpr float kShrink = 0.25f, kGrow = 4.0f;        // exact, both
constexpr uint32_t kSmallestScaleBits = 0x00800000u;  // 2^-126: below it x / scale loses its digits

DSC_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

DSC_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

// --- one rounding each, whatever the compiler's flags --------------------------------------------------------------

DSC_HD float add(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

DSC_HD float subtract(float a, float b) { return add(a, -b); }

DSC_HD float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

DSC_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

// a * b + c, rounded once.
DSC_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

// To the nearest integer, half to even, keeping the sign of zero. Right for |value| < 2^23; beyond, a number that is as
// large (which is all that a following clamp needs), Inf or NaN.
DSC_HD float round_half_even(float value) {
#if defined(__CUDA_ARCH__)
    return rintf(value);
#else
    const uint32_t bits = bits_of(value);
    const float magnitude = float_of(bits & kMagnitudeBits);
    return float_of(bits_of((magnitude + 0x1p23f) - 0x1p23f) | (bits & ~kMagnitudeBits));
#endif
}

// NaN stays NaN and -0.0 stays -0.0 between bounds that contain them.
DSC_HD float clamp(float value, float low, float high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

// value + kRound holds the nearest integer of |value| < 2^22, half to even, in its lowest bits, as two's complement.
constexpr float kRound = 0x1.8p23f;

// --- scales --------------------------------------------------------------------------------------------------------

// The scale of a row whose largest magnitude has these bits: at least 2^-126; NaN if any value was NaN or Inf.
DSC_HD float row_scale(uint32_t largest_bits, float steps) {
    if (largest_bits >= kInfinityBits) return float_of(kNanBits);
    const float scale = divide(float_of(largest_bits), steps);
    const float smallest = float_of(kSmallestScaleBits);
    return scale < smallest ? smallest : scale;
}

struct ScaleAndOffset {
    float scale;
    float offset;
};

// The range of an asymmetric row from its least and greatest value (+0.0 for either zero), NaN if any value was. A row
// of equal values has the offset that reads back as that value. Where max - min overflows, both count a quarter; an
// offset ends at the largest float.
DSC_HD ScaleAndOffset row_range(float lowest, float highest, float steps) {
    float width = divide(subtract(highest, lowest), steps);
    if ((bits_of(width) & kMagnitudeBits) >= kInfinityBits)
        width = multiply(divide(subtract(multiply(highest, kShrink), multiply(lowest, kShrink)), steps), kGrow);
    if ((bits_of(width) & kMagnitudeBits) >= kInfinityBits) return {float_of(kNanBits), float_of(kNanBits)};
    const float smallest = float_of(kSmallestScaleBits);
    if (width < smallest) return {smallest, lowest};
    const float offset = multiply(round_half_even(divide(lowest, width)), width);
    return {width, clamp(offset, -kLargestFloat, kLargestFloat)};
}

// Whether values of a row may overflow on the way to their quantized value or back, or end beyond `limit`, the largest
// finite value of their dtype. Such rows are quantized at a quarter of their size, and what is beyond the limit ends
// there.
DSC_HD bool is_extreme(ScaleAndOffset range, float limit) {
    const float magnitude = float_of(bits_of(range.offset) & kMagnitudeBits);
    return add(multiply(512.0f, range.scale), magnitude) >= limit;
}

// The scale of a block of a payload: 0 for a block that is as good as zero, NaN if any value was NaN or Inf.
DSC_HD float block_scale(uint32_t largest_bits, float quant_max) {
    if (largest_bits >= kInfinityBits) return float_of(kNanBits);
    const float scale = divide(float_of(largest_bits), quant_max);
    return scale < float_of(kSmallestScaleBits) ? 0.0f : scale;
}

// --- 16-bit floats by their bits; half to even; every NaN becomes the quiet one ------------------------------------

DSC_HD float float_of_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

DSC_HD uint16_t bf16_of_float(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & kMagnitudeBits) > kInfinityBits) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

DSC_HD float float_of_fp16(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    // A subnormal half is its digits times 2^-24, which fp32 holds exactly.
    if (magnitude < 0x0400u) return float_of(bits_of(static_cast<float>(magnitude) * 0x1p-24f) | sign);
    const uint32_t exponent_shift = magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
    const uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0u;
    return float_of(((magnitude << 13) + exponent_shift) | quiet | sign);
}

DSC_HD uint16_t fp16_of_float(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & kMagnitudeBits;
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    if (magnitude > kInfinityBits) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and up round to Inf
    // Below the least normal half, adding 0.5 lines the digits up with those of a subnormal one and rounds them.
    if (magnitude < 0x38800000u)
        return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - ((127u - 15u) << 23)) >> 13));
}

}  // namespace ds_compress::math
