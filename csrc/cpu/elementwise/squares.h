// Sums of squares under a packed mask. To be included in a .cpp of one instruction set.
#pragma once

#include "mask.h"

namespace ds_compress::cpu {
namespace {

constexpr int kDoubles = kLanes / 2;
using Doubles = double __attribute__((vector_size(8 * kDoubles)));
using HalfFloats = float __attribute__((vector_size(4 * kDoubles)));

DSC_INLINE Doubles widened(Floats values, int half) {
    HalfFloats part;
    memcpy(&part, reinterpret_cast<const char*>(&values) + half * static_cast<int>(sizeof part), sizeof part);
    return __builtin_convertvector(part, Doubles);
}

// Where there is no mask all is kept.
template <class T>
void add_squares(const typename T::Stored* values, int64_t count, Mask mask, double* sums) {
    Doubles kept[2] = {}, lost[2] = {};
    const int64_t whole = mask.packed ? whole_windows(mask, count) : count / 64 * 64;
    for (int64_t i = 0; i < whole; i += 64) {
        const uint64_t bits = mask.packed ? window(mask.packed, mask.bit + i) : ~uint64_t{0};
#pragma GCC unroll 16
        for (int at = 0; at < 64; at += kLanes) {
            const Ints spread = splat(static_cast<int32_t>(bits >> (at / 32 * 32)));
            const Ints look = (Ints)looked_at<uint32_t>(at / kLanes);
            const Ints is_kept = (Ints)((spread & look) == look);
            const Floats value = T::load(values + i + at);
            const Floats of_kept = floats_of(bits_of(value) & is_kept), of_lost = floats_of(bits_of(value) & ~is_kept);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const Doubles a = widened(of_kept, half), b = widened(of_lost, half);
                kept[half] += a * a;
                lost[half] += b * b;
            }
        }
    }
    double both[2] = {};
    for (int64_t i = whole; i < count; i++) {
        const double value = T::widen(values[i]);
        both[!mask.packed || bit_at(mask, i)] += value * value;
    }
    for (int half = 0; half < 2; half++)
        for (int lane = 0; lane < kDoubles; lane++) {
            both[1] += kept[half][lane];
            both[0] += lost[half][lane];
        }
    sums[0] += both[0] + both[1];
    sums[1] += both[1];
}

void mask_square_sums(const void* values, Float type, int64_t count, Mask mask, double* sums) {
    switch (type) {
        case Float::bf16:
            return add_squares<Bf16>(static_cast<const uint16_t*>(values), count, mask, sums);
        case Float::fp16:
            return add_squares<Fp16>(static_cast<const uint16_t*>(values), count, mask, sums);
        default:
            return add_squares<Fp32>(static_cast<const float*>(values), count, mask, sums);
    }
}

}  // namespace
}  // namespace ds_compress::cpu
