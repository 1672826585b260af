// The int4 engine (see int4_driver.h) for AVX-512 VNNI. To be included in linear_avx512.cpp.
#pragma once

#include "int4_driver.h"
#include "vnni_avx512.h"

namespace ds_compress::cpu {
namespace {

struct Int8Values {
    using Stored = int8_t;
    static DSC_INLINE int store(int8_t* to, Ints a, Ints b) {
        store_bytes(to, a);
        store_bytes(to + kLanes, b);
        return 0;
    }
    struct Correction {
        DSC_INLINE void add(int) {}
    };
};

template <int kRows>
DSC_INLINE void add_products(__m512i (&s)[kRows][3], const __m512i (&weights)[3], const int8_t* a, int64_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
        const __m512i x = _mm512_set1_epi32(load_as<int32_t>(a + r * stride));
#pragma GCC unroll 3
        for (int j = 0; j < 3; j++) DSC_VPDPBUSD(s[r][j], weights[j], x);
    }
}

// kUnpacked: each value of the weight has a byte of its own, as `unpack` leaves it.
template <int kRows, bool kUnpacked>
[[gnu::noinline]] void int4_tile(const Int4Tile& tile) {
    const __m512i mask = _mm512_set1_epi8(15);
    const int8_t* a = tile.quantized;
    const uint8_t* w = tile.weights;
    for (int64_t group = 0; group < tile.groups; group++) {
        const int64_t first = group * tile.blocks_per_group, after = first + tile.blocks_per_group;
        __m512i s[kRows][3];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++)
#pragma GCC unroll 3
            for (int j = 0; j < 3; j++) s[r][j] = _mm512_set1_epi32(-tile.excess[r * tile.groups + group]);
        // 8 values of K: the low nibbles, then the high ones.
        for (int64_t step = 4 * ((after < tile.blocks ? after : tile.blocks) - first); step > 0; step--) {
            __m512i low[3], high[3];
#pragma GCC unroll 3
            for (int j = 0; j < 3; j++) {
                const __m512i both = _mm512_loadu_si512(w + 64 * j);
                low[j] = kUnpacked ? both : _mm512_and_si512(both, mask);
                if (!kUnpacked) high[j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
            }
            add_products<kRows>(s, low, a, tile.stride);
#pragma GCC unroll 3
            for (int j = 0; j < 3; j++)
                if (kUnpacked) high[j] = _mm512_loadu_si512(w + 192 + 64 * j);
            add_products<kRows>(s, high, a + 4, tile.stride);
            a += 8;
            w += kUnpacked ? 8 * 48 : 4 * 48;
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 3
            for (int j = 0; j < 3; j++) {
                float* value = tile.values + 48 * r + 16 * j;
                const Floats sum = __builtin_convertvector((Ints)s[r][j], Floats);
                const Floats product = sum * load_as<Floats>(tile.scales + 48 * group + 16 * j);
                store(value, group == 0 ? product : load_as<Floats>(value) + product);
            }
        }
    }
}

struct Int4Avx512 {
    using Values = Int8Values;
    static constexpr int kColumns = 48;
    static constexpr int64_t kRows = 6;

    static void multiply(int64_t rows, const Int4Tile& tile) {
        static constexpr void (*kTiles[])(const Int4Tile&) = {int4_tile<1, false>, int4_tile<2, false>,
                                                              int4_tile<3, false>, int4_tile<4, false>,
                                                              int4_tile<5, false>, int4_tile<6, false>};
        kTiles[rows - 1](tile);
    }

    // For many rows: the nibbles of a panel are spread once, and a tile has as many rows as one of int8.
    static constexpr int64_t kUnpackedRows = 8;

    static void unpack(const uint8_t* weights, int64_t blocks, uint8_t* to) {
        const __m512i mask = _mm512_set1_epi8(15);
        for (int64_t step = 4 * blocks; step > 0; step--, weights += 4 * 48, to += 8 * 48)
            for (int j = 0; j < 3; j++) {
                const __m512i both = _mm512_loadu_si512(weights + 64 * j);
                _mm512_storeu_si512(to + 64 * j, _mm512_and_si512(both, mask));
                _mm512_storeu_si512(to + 192 + 64 * j, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
            }
    }

    static void multiply_unpacked(int64_t rows, const Int4Tile& tile) {
        static constexpr void (*kTiles[])(const Int4Tile&) = {
            int4_tile<1, true>, int4_tile<2, true>, int4_tile<3, true>, int4_tile<4, true>,
            int4_tile<5, true>, int4_tile<6, true>, int4_tile<7, true>, int4_tile<8, true>};
        kTiles[rows - 1](tile);
    }
};

}  // namespace
}  // namespace ds_compress::cpu
