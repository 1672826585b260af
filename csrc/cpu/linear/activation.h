// Activations in fp32, within 2e-6 relative + 2e-7 absolute of the formula in float64.
// To be included in a .cpp of one instruction set.
#pragma once

#include "../elementwise/simd.h"
#include "linear.h"

namespace ds_compress::cpu {
namespace {

DSC_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

template <int kCount>
DSC_INLINE Floats polynomial(Floats x, const float (&highest_first)[kCount]) {
    Floats sum = splat(highest_first[0]);
#pragma GCC unroll 16
    for (int i = 1; i < kCount; i++) sum = multiply_add(sum, x, splat(highest_first[i]));
    return sum;
}

// e^x, NaN for NaN; arguments beyond +-87 are taken as +-87.
DSC_INLINE Floats exponential(Floats x) {
    x = clamp(x, splat(-87.0f), splat(87.0f));
    const Floats power = round_half_even(x * splat(1.44269504f));
    // ln 2 in two parts, the first with so few digits that its product is exact.
    Floats rest = multiply_add(power, splat(-0.693359375f), x);
    rest = multiply_add(power, splat(2.12194440e-4f), rest);
    static constexpr float kTaylor[] = {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f};
    const Ints exponent = __builtin_convertvector(power, Ints) << 23;
    return floats_of(bits_of(polynomial(rest, kTaylor)) + exponent);
}

DSC_INLINE Floats absolute(Floats x) { return floats_of(bits_of(x) & INT32_MAX); }

// 1 / (1 + e^-x) times x; -Inf gives a tiny number where the formula would be -Inf * 0.
DSC_INLINE Floats times_sigmoid(Floats x, Floats argument) {
    return larger(splat(-3.0e38f), x) / (1.0f + exponential(-argument));
}

DSC_INLINE Floats silu(Floats x) { return times_sigmoid(x, x); }

// 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
DSC_INLINE Floats gelu_tanh(Floats x) {
    const Floats bounded = clamp(x, splat(-20.0f), splat(20.0f));
    const Floats cubic = multiply_add(bounded * bounded, splat(0.0713548163f), splat(1.59576912f));
    return times_sigmoid(x, bounded * cubic);
}

// x (1 - tail) for x > 0 and x tail for x < 0, where tail = erfc(|x| / sqrt 2) / 2 = e^(-x^2 / 2) M(|x|) and M is a
// polynomial fitted on [0, 6] for the least error of x * tail. Beyond 6, x * tail is below 1e-8 and taken as at 6.
DSC_INLINE Floats gelu_erf(Floats x) {
    const Floats distance = smaller(splat(6.0f), absolute(x));
    static constexpr float kTail[] = {
        -1.79188078e-07f, 4.83537769e-06f, -5.88497387e-05f, 0.000432374654f, -0.00217867526f, 0.00817450695f,
        -0.0243887119f, 0.0610233434f, -0.132349849f, 0.249843553f, -0.398923337f, 0.499999255f};
    const Floats tail = polynomial(distance, kTail) * exponential(distance * distance * splat(-0.5f));
    return larger(Floats{}, x) - distance * tail;
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
