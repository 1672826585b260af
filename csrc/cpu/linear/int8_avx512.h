// The int8 engine (see int8_driver.h) for AVX-512 VNNI. To be included in linear_avx512.cpp.
//
// vpdpbusd multiplies unsigned by signed bytes, so x is stored as q + 128 and the sums of a column start
// from -128 times the sum of its weights. A panel has 48 columns: for every 4 values of K, 4 bytes for each of them.
#pragma once

#include "int8_driver.h"
#include "vnni_avx512.h"

namespace ds_compress::cpu {
namespace {

struct Uint8Values {
    using Stored = uint8_t;
    static DSC_INLINE int store(uint8_t* to, Ints a, Ints b) {
        store_bytes(to, a + 128);
        store_bytes(to + kLanes, b + 128);
        return 0;
    }
    struct Correction {
        DSC_INLINE void add(int) {}
        DSC_INLINE int32_t total() const { return 0; }
    };
};

// kRows rows of 48 sums, which start from `from` (rows `from_stride` apart) and end at `to` (rows 48 apart).
// quads: K / 4. next: weights to prefetch, all that few rows read (they go ahead in their own stream) or a third.
template <int kRows>
[[gnu::noinline]] void int8_tile(const uint8_t* quantized, int64_t stride, const uint8_t* weights, int64_t quads,
                                 const uint8_t* next, const int32_t* from, int64_t from_stride, int32_t* to) {
    constexpr int kLines = kRows < 8 ? 3 : 1;
    __m512i s[kRows][3];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 3
        for (int j = 0; j < 3; j++) s[r][j] = _mm512_loadu_si512(from + r * from_stride + 16 * j);
    for (; quads > 0; quads--, quantized += 4, weights += 4 * 48, next += 64 * kLines) {
#pragma GCC unroll 3
        for (int i = 0; i < kLines; i++) __builtin_prefetch(next + 64 * i);
        const __m512i w0 = _mm512_loadu_si512(weights);
        const __m512i w1 = _mm512_loadu_si512(weights + 64);
        const __m512i w2 = _mm512_loadu_si512(weights + 128);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) {
            const __m512i a = _mm512_set1_epi32(load_as<int32_t>(quantized + r * stride));
            DSC_VPDPBUSD(s[r][0], a, w0);
            DSC_VPDPBUSD(s[r][1], a, w1);
            DSC_VPDPBUSD(s[r][2], a, w2);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 3
        for (int j = 0; j < 3; j++) _mm512_storeu_si512(to + r * 48 + 16 * j, s[r][j]);
}

struct Int8Avx512 {
    using Values = Uint8Values;
    using Session = NoSession;
    static constexpr int kColumns = 48;
    static constexpr int kRows = 8;
    static constexpr int64_t kDepth = 4;
    static constexpr int64_t kChunk = 2048;  // tiles read them from the second-level cache as fast as they multiply
    static constexpr int64_t kPrefetchParts = 3;
    static constexpr int64_t kAheadBytes = 8192;

    static int64_t panel_bytes(int64_t depth) { return (4 + depth) * kColumns; }

    static void pack(const uint8_t* rows, int64_t stride, int64_t depth, const int32_t*, uint8_t* panel) {
        for (int j = 0; j < kColumns; j++) {
            const uint8_t* row = rows + j * stride;
            uint8_t* to = panel + 4 * kColumns + 4 * j;
            int32_t sum = 0;
            for (int64_t k = 0; k < depth; k += 4, to += 4 * kColumns)
                for (int i = 0; i < 4; i++) {
                    const int q = row[k + i] - 128;
                    to[i] = static_cast<uint8_t>(q);
                    sum += q;
                }
            const int32_t constant = -128 * sum;
            memcpy(panel + 4 * j, &constant, 4);
        }
    }

    static DSC_INLINE void tile(int64_t rows, const uint8_t* quantized, int64_t stride, const uint8_t* weights,
                                int64_t depth, const uint8_t* next, const int32_t* from, int64_t from_stride,
                                int32_t* to) {
        static constexpr decltype(&int8_tile<1>) kTiles[] = {int8_tile<1>, int8_tile<2>, int8_tile<3>, int8_tile<4>,
                                                             int8_tile<5>, int8_tile<6>, int8_tile<7>, int8_tile<8>};
        kTiles[rows - 1](quantized, stride, weights, depth / 4, next, from, from_stride, to);
    }
};

}  // namespace
}  // namespace ds_compress::cpu
