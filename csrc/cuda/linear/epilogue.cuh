// From sums to outputs: dequantize, add the bias, activate, cast, store.
//
// A block's sums go through shared memory, so that the rest is one short loop over rows, with coalesced stores and
// one copy of every activation, instead of being unrolled over the registers of mma's layout.
#pragma once

#include "ds_compress/device.h"
#include "ds_compress/math.h"

#include "../launchers.h"

namespace ds_compress::linear {

struct Epilogue {
    const float* input_scale;   // (m,)
    const float* weight_scale;  // (n,), or null when the sums are scaled already
    const float* bias;          // (n,), or null
    void* out;                  // (m, n)
    int out_dtype, activation;
    int64_t m, n;
};

/// x erfc(-x / sqrt 2) / 2 without a branch, since a tile activates a hundred values a thread. With t = 1 / (1 + 0.3
/// z), erfc(z) = exp(-z^2) t P(t) within 2e-8 for 0 <= z <= 9: P was fitted to scipy's erfcx at Chebyshev's points.
DSC_DEVICE float gelu_erf(float x) {
    const float magnitude = math::float_of(math::bits_of(x) & math::kMagnitudeBits);
    const float t = approximate_reciprocal(math::fused(0.3f * 0.70710678f, magnitude, 1.0f));
    float p = -0.12925847f;
    p = math::fused(p, t, 0.48417068f);
    p = math::fused(p, t, -0.50913280f);
    p = math::fused(p, t, 0.54374641f);
    p = math::fused(p, t, -0.091583930f);
    p = math::fused(p, t, 0.21344759f);
    p = math::fused(p, t, 0.14877333f);
    p = math::fused(p, t, 0.17064433f);
    p = math::fused(p, t, 0.16919293f);
    const float half_erfc = 0.5f * p * t * exp2f(x * x * -0.72134752f);  // exp(-x^2 / 2)
    // Beyond 1000 the second term is 0; of an infinite x it would be NaN.
    return x < 0.0f ? x * half_erfc : x - (x > 1000.0f ? 0.0f : x * half_erfc);
}

/// Within 2e-6 relative + 2e-7 absolute of the exact function.
DSC_DEVICE float activate(float x, int activation) {
    if (activation > dsc_relu) x = x < -1000.0f ? -1000.0f : x;  // -Inf has the limit, not Inf times 0
    switch (activation) {
        case dsc_relu:
            return x < 0.0f ? 0.0f : x;  // NaN stays NaN
        case dsc_gelu_erf:
            return gelu_erf(x);
        case dsc_gelu_tanh: {
            const float inner = 1.5957691216057308f * (x + 0.044715f * x * x * x);
            return x * approximate_reciprocal(1.0f + expf(-inner));  // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u))
        }
        case dsc_silu:
            return x * approximate_reciprocal(1.0f + expf(-x));
        default:
            return x;
    }
}

/// The output of one sum at (row, column).
DSC_DEVICE float finish(const Epilogue& e, float sum, float input_scale, int64_t column) {
    float scale = input_scale;
    if (e.weight_scale != nullptr) scale = math::multiply(scale, e.weight_scale[column]);
    float y = math::multiply(sum, scale);
    if (e.bias != nullptr) y = math::add(y, e.bias[column]);
    return activate(y, e.activation);
}

template <class T, int count>
DSC_DEVICE void store_as(void* out, int64_t index, const float (&values)[count], int64_t valid) {
    struct alignas(sizeof(T) * count) Store {
        T values[count];
    } store;
#pragma unroll
    for (int i = 0; i < count; i++) store.values[i] = from_float<T>(values[i]);
    T* const to = static_cast<T*>(out) + index;
    if (valid >= count && reinterpret_cast<uintptr_t>(to) % sizeof(store) == 0) {
        *reinterpret_cast<Store*>(to) = store;
    } else {
#pragma unroll
        for (int i = 0; i < count; i++) {
            if (i < valid) to[i] = store.values[i];
        }
    }
}

/// Stores the first `valid` of `count` consecutive outputs in the dtype that was asked for.
template <int count>
DSC_DEVICE void store(const Epilogue& e, int64_t index, const float (&values)[count], int64_t valid) {
    switch (e.out_dtype) {
        case dsc_float32:
            return store_as<float>(e.out, index, values, valid);
        case dsc_bfloat16:
            return store_as<__nv_bfloat16>(e.out, index, values, valid);
        default:
            return store_as<__half>(e.out, index, values, valid);
    }
}

/// The outputs of a block from its sums in shared memory: rows of `pitch` floats.
template <int rows, int columns, int pitch, int threads>
DSC_DEVICE void finish_tile(const Epilogue& e, const float* sums, int64_t first_row, int64_t first_column) {
    constexpr int count = 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * columns / count; i += threads) {
        const int row = i / (columns / count), column = i % (columns / count) * count;
        const int64_t out_row = first_row + row, out_column = first_column + column;
        if (out_row >= e.m || out_column >= e.n) continue;
        const float4 sum = *reinterpret_cast<const float4*>(sums + row * pitch + column);
        float values[count] = {sum.x, sum.y, sum.z, sum.w};
        const float input_scale = e.input_scale[out_row];
#pragma unroll
        for (int j = 0; j < count; j++) {
            // A column beyond the last is computed from the last one's scale and not stored.
            values[j] = finish(e, values[j], input_scale, out_column + j < e.n ? out_column + j : e.n - 1);
        }
        store(e, out_row * e.n + out_column, values, e.n - out_column);
    }
}

}  // namespace ds_compress::linear
