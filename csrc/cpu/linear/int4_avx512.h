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
[[gnu::noinline]] void int4_tile(const Int4Tile& tile) {
    const __m512i mask = _mm512_set1_epi8(15);
    const int8_t* a = tile.quantized;
    const uint8_t* w = tile.weights;
    for (int64_t group = 0; group < tile.groups; group++) {
        const int64_t first = group * tile.blocks_per_group, after = first + tile.blocks_per_group;
        __m512i s[kRows][3];
#pragma GCC unroll 6
        for (int r = 0; r < kRows; r++)
#pragma GCC unroll 3
            for (int j = 0; j < 3; j++) s[r][j] = _mm512_set1_epi32(-tile.excess[r * tile.groups + group]);
        // 8 values of K: the low nibbles, then the high ones.
        for (int64_t step = 4 * ((after < tile.blocks ? after : tile.blocks) - first); step > 0; step--) {
            __m512i low[3], high[3];
#pragma GCC unroll 3
            for (int j = 0; j < 3; j++) {
                const __m512i both = _mm512_loadu_si512(w + 64 * j);
                low[j] = _mm512_and_si512(both, mask);
                high[j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
            }
#pragma GCC unroll 6
            for (int r = 0; r < kRows; r++) {
                const __m512i a0 = _mm512_set1_epi32(load_as<int32_t>(a + r * tile.stride));
                const __m512i a1 = _mm512_set1_epi32(load_as<int32_t>(a + r * tile.stride + 4));
#pragma GCC unroll 3
                for (int j = 0; j < 3; j++) {
                    DSC_VPDPBUSD(s[r][j], low[j], a0);
                    DSC_VPDPBUSD(s[r][j], high[j], a1);
                }
            }
            a += 8;
            w += 4 * 48;
        }
#pragma GCC unroll 6
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
        static constexpr void (*kTiles[])(const Int4Tile&) = {int4_tile<1>, int4_tile<2>, int4_tile<3>,
                                                              int4_tile<4>, int4_tile<5>, int4_tile<6>};
        kTiles[rows - 1](tile);
    }
};

}  // namespace
}  // namespace ds_compress::cpu
