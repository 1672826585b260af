// Scores against a window of keys: what lies above it is kept, what lies inside is handed out to be decided exactly.
// To be included in a .cpp of one instruction set.
#pragma once

#include "select.h"

namespace ds_compress::cpu {
namespace {

constexpr int kWindowStep = 64;  // elements that one word of the mask covers

template <bool kMagnitude>
DSC_INLINE Ints window_keys(Floats scores) {
    if constexpr (kMagnitude) return bits_of(scores) & INT32_MAX;
    const Ints bits = bits_of(scores + 0.0f);
    return bits ^ ((bits >> 31) & INT32_MAX);
}

// Up to 64 elements, of which `competes` says who takes part.
template <bool kMagnitude>
DSC_INLINE uint64_t window_step(const float* scores, uint64_t competes, int32_t first, Window window,
                                WindowFound& found) {
    constexpr int kVectors = kWindowStep / kLanes;
    uint64_t above = 0, inside = 0, non_finite = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
        const Floats values = load_as<Floats>(scores + i * kLanes);
        const Ints keys = window_keys<kMagnitude>(values), magnitudes = bits_of(values) & INT32_MAX;
        const int at = i * kLanes;
        above |= static_cast<uint64_t>(sign_bits((Ints)(keys > splat(window.high)))) << at;
        inside |= static_cast<uint64_t>(sign_bits((Ints)(keys >= splat(window.low)))) << at;
        non_finite |= static_cast<uint64_t>(sign_bits((Ints)(magnitudes > splat(0x7f7fffff)))) << at;
    }
    inside &= ~above & competes;
    above &= competes;
    found.above += __builtin_popcountll(above);
    found.non_finite += __builtin_popcountll(non_finite & competes);
    for (; inside != 0; inside &= inside - 1) {
        const int i = __builtin_ctzll(inside);
        const auto bits = static_cast<int32_t>(math::bits_of(kMagnitude ? scores[i] : scores[i] + 0.0f));
        found.keys[found.inside] = kMagnitude ? bits & INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
        found.places[found.inside++] = first + i;
    }
    return above;
}

template <bool kMagnitude>
WindowFound window_of(const float* scores, const uint8_t* competing, int64_t count, int32_t first, Window window,
                      uint8_t* packed, int32_t* keys, int32_t* places) {
    WindowFound found{0, 0, 0, keys, places};
    int64_t i = 0;
    for (; i + kWindowStep <= count; i += kWindowStep) {
        const uint64_t competes = competing ? load_as<uint64_t>(competing + i / 8) : ~uint64_t{0};
        store(packed + i / 8,
              window_step<kMagnitude>(scores + i, competes, first + static_cast<int32_t>(i), window, found));
    }
    if (const int64_t left = count - i; left > 0) {
        float last[kWindowStep] = {};
        memcpy(last, scores + i, static_cast<size_t>(left) * sizeof(float));
        uint64_t competes = ~uint64_t{0};
        if (competing) memcpy(&competes, competing + i / 8, static_cast<size_t>(left + 7) / 8);
        competes &= ~uint64_t{0} >> (kWindowStep - left);
        const uint64_t above = window_step<kMagnitude>(last, competes, first + static_cast<int32_t>(i), window, found);
        memcpy(packed + i / 8, &above, static_cast<size_t>(left + 7) / 8);
    }
    return found;
}

WindowFound mask_window(const float* scores, const uint8_t* competing, int64_t count, int32_t first, Window window,
                        uint8_t* packed, int32_t* keys, int32_t* places) {
    return window.magnitude ? window_of<true>(scores, competing, count, first, window, packed, keys, places)
                            : window_of<false>(scores, competing, count, first, window, packed, keys, places);
}

}  // namespace
}  // namespace ds_compress::cpu
