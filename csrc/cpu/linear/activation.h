// Activations in fp32, within 2e-6 relative + 2e-7 absolute of the formula in float64.
// To be included in a .cpp of one instruction set.
#pragma once

#include "../elementwise/simd.h"
#include "linear.h"

namespace ds_compress::cpu {
namespace {

template <int kCount>
DSC_INLINE Floats sum_of_powers(Floats* terms, Floats x) {
    if constexpr (kCount == 1) return terms[0];
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; i++) terms[i] = multiply_add(terms[2 * i + 1], x, terms[2 * i]);
    if constexpr (kCount % 2) terms[kCount / 2] = terms[kCount - 1];
    return sum_of_powers<(kCount + 1) / 2>(terms, x * x);
}

// Coefficients from the lowest power. By halves (Estrin), which waits less for results than one power after the other.
template <int kCount>
DSC_INLINE Floats polynomial(Floats x, const float (&coefficients)[kCount]) {
    Floats terms[kCount];
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i++) terms[i] = splat(coefficients[i]);
    return sum_of_powers<kCount>(terms, x);
}

// 2^x for |x| <= 126. Adding 1.5 * 2^23 leaves the nearest integer in the low bits; the polynomial is 2^r for
// |r| <= 1/2, within 8e-8 relative.
DSC_INLINE Floats power_of_2(Floats x) {
    const Floats shifted = x + 12582912.0f;
    const Floats rest = x - (shifted - 12582912.0f);
    static constexpr float kPower[] = {1.00000012f,   0.693146944f,   0.240221202f,
                                       0.0555071346f, 0.00967554096f, 0.00132764073f};
    return floats_of(bits_of(polynomial(rest, kPower)) + (bits_of(shifted) << 23));
}

DSC_INLINE Floats absolute(Floats x) { return floats_of(bits_of(x) & INT32_MAX); }

// x / (1 + 2^power). Both callers bound the power, which is at least 2^95 for x = -1e4: from there on, -Inf included,
// the result is as good as 0.
DSC_INLINE Floats over_one_and_power(Floats x, Floats power) {
    return larger(splat(-1.0e4f), x) / (1.0f + power_of_2(power));
}

// x sigmoid(x) = x / (1 + e^-x).
DSC_INLINE Floats silu(Floats x) {
    const Floats bounded = clamp(x, splat(-87.0f), splat(87.0f));
    return over_one_and_power(x, bounded * splat(-1.44269504f));
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3); tanh(u) is 1 in fp32 long before x = 9.
DSC_INLINE Floats gelu_tanh(Floats x) {
    const Floats bounded = clamp(x, splat(-9.0f), splat(9.0f));
    const Floats cubic = multiply_add(bounded * bounded, splat(-0.102943240f), splat(-2.30220820f));  // times log2 e
    return over_one_and_power(x, bounded * cubic);
}

// max(x, 0) - |x| tail, where tail = erfc(|x| / sqrt 2) / 2 = 2^P(|x|), with the polynomial P fitted on [0, 6] for the
// least error of |x| tail. Beyond 6, |x| tail is below 1e-8 and taken as at 6.
DSC_INLINE Floats gelu_erf(Floats x) {
    const Floats distance = smaller(splat(6.0f), absolute(x));
    static constexpr float kLogTail[] = {-0.999996126f,  -1.15116286f,     -0.458928406f,  -0.05312372f,
                                         0.00781063875f, -0.000635900418f, 2.8737341e-07f, 3.15253101e-06f};
    return larger(Floats{}, x) - distance * power_of_2(polynomial(distance, kLogTail));
}

template <Activation kActivation>
DSC_INLINE Floats activate(Floats x) {
    switch (kActivation) {
        case Activation::none:
            return x;
        case Activation::relu:
            return larger(Floats{}, x);  // the second where one is NaN or both are zero
        case Activation::gelu_erf:
            return gelu_erf(x);
        case Activation::gelu_tanh:
            return gelu_tanh(x);
        case Activation::silu:
            return silu(x);
    }
    return x;
}

}  // namespace
}  // namespace ds_compress::cpu
