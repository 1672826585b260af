// N:M selection: the n largest scores of every m.
// To be included in a .cpp of one instruction set.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ds_compress::cpu {
namespace {

// Integers in the order of the scores: -0.0 equals +0.0, NaN is the largest.
DSC_INLINE Ints order_keys(Floats scores) {
    const Ints bits = bits_of(scores + 0.0f);
    const Ints keys = bits ^ ((bits >> 31) & INT32_MAX);
    const Ints is_nan = (Ints)(scores != scores);
    return (keys & ~is_nan) | (is_nan & INT32_MAX);
}

DSC_INLINE int32_t order_key(float score) {
    if (score != score) return INT32_MAX;
    const auto bits = static_cast<int32_t>(math::bits_of(score + 0.0f));
    return bits ^ ((bits >> 31) & INT32_MAX);
}

// Bits of the lanes that are among the n largest of their group of kM lanes, ties to the lower lane.
template <int kM>
DSC_INLINE uint32_t top_of_groups(Ints keys, Ints n) {
    Ints rank{};
#pragma GCC unroll 16
    for (int turn = 1; turn < kM; turn++) {
        Ints from{}, earlier{};
        for (int i = 0; i < kLanes; i++) {
            const int other = (i + turn) % kM;
            from[i] = i / kM * kM + other;
            earlier[i] = other < i % kM;
        }
        // An earlier lane beats this one when it is as large: other > mine - 1.
        rank -= (Ints)(__builtin_shuffle(keys, from) > keys - earlier);
    }
    return sign_bits((Ints)(rank < n));
}

// The groups of one row from `begin` on, of which the last may be short.
void top_of_short_groups(const float* scores, int64_t count, int n, int m, BitWriter& writer) {
    for (int64_t begin = 0; begin < count; begin += m) {
        const int size = count - begin < m ? static_cast<int>(count - begin) : m;
        for (int i = 0; i < size; i++) {
            const int32_t mine = order_key(scores[begin + i]);
            int rank = 0;
            for (int j = 0; j < size && rank < n; j++) rank += order_key(scores[begin + j]) > mine - (j < i) && j != i;
            writer.push(rank < n, 1);
        }
    }
}

template <int kM>
void top_of_rows(const float* scores, int64_t rows, int64_t columns, int n, uint8_t* packed) {
    BitWriter writer(packed, 0);
    for (int64_t row = 0; row < rows; row++, scores += columns) {
        int64_t i = 0;
        for (; i + kLanes <= columns; i += kLanes)
            writer.push(top_of_groups<kM>(order_keys(load_as<Floats>(scores + i)), splat(n)), kLanes);
        top_of_short_groups(scores + i, columns - i, n, kM, writer);
    }
    writer.finish();
}

void mask_n_of_m(const float* scores, int64_t rows, int64_t columns, int n, int m, uint8_t* packed) {
    if (m == 2) return top_of_rows<2>(scores, rows, columns, n, packed);
    if (m == 4) return top_of_rows<4>(scores, rows, columns, n, packed);
    if constexpr (kLanes >= 8)
        if (m == 8) return top_of_rows<8>(scores, rows, columns, n, packed);
    if constexpr (kLanes >= 16)
        if (m == 16) return top_of_rows<16>(scores, rows, columns, n, packed);
    BitWriter writer(packed, 0);
    for (int64_t row = 0; row < rows; row++) top_of_short_groups(scores + row * columns, columns, n, m, writer);
    writer.finish();
}

}  // namespace
}  // namespace ds_compress::cpu
