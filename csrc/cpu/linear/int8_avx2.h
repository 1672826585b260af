// The int8 engine (see int8_driver.h) for AVX2. To be included in linear_avx2.cpp.
#pragma once

#include "int8_driver.h"
#include "int8_tile_avx2.h"

namespace ds_compress::cpu {
namespace {

// int16 in order. A row is corrected by the sum of a0 a2 + a1 a3 over its quads; so is a column of weights.
struct Int16Values {
    using Stored = int16_t;

    static DSC_INLINE __m256i store(int16_t* to, Ints a, Ints b) {
        const __m256i lanes = _mm256_packs_epi32((__m256i)a, (__m256i)b);
        const __m256i quantized = _mm256_permute4x64_epi64(lanes, 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), quantized);
        return quantized;
    }

    struct Correction {
        __m256i sums = _mm256_setzero_si256();
        DSC_INLINE void add(__m256i quantized) {
            const __m256i partners = _mm256_shuffle_epi32(quantized, 0xb1);
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(quantized, partners));
        }
        // Every product is in two neighbours.
        DSC_INLINE int32_t total() const {
            const auto lanes = (Ints)sums;
            return lanes[0] + lanes[2] + lanes[4] + lanes[6];
        }
    };
};

struct Int8Avx2 {
    using Values = Int16Values;
    using Session = NoSession;
    static constexpr int kColumns = kTileColumns;
    static constexpr int kRows = 4;
    static constexpr int64_t kDepth = 8;
    static constexpr int64_t kChunk = 1024;
    static constexpr int64_t kPrefetchParts = 2;
    static constexpr int64_t kAheadBytes = 2048;

    // Minus the corrections of the columns, then the quads.
    static int64_t panel_bytes(int64_t depth) { return (4 + depth) * kColumns; }

    static DSC_INLINE void tile(int64_t rows, const int16_t* quantized, int64_t stride, const uint8_t* weights,
                                int64_t depth, const uint8_t* next, const int32_t* from, int64_t from_stride,
                                int32_t* to) {
        const auto run = rows == 4 ? int8_tile<4> : rows == 3 ? int8_tile<3> : rows == 2 ? int8_tile<2> : int8_tile<1>;
        run(quantized, 2 * stride, weights, depth / 8, next, from, from_stride, to);
    }

    // 16 rows of weights, 16 values of K at a time: bytes, transposed by quads, halves of the quads apart.
    static void pack(const int16_t* rows, int64_t stride, int64_t depth, const int32_t* corrections, uint8_t* panel) {
        for (int j = 0; j < kColumns; j++) {
            const int32_t constant = -corrections[j];
            memcpy(panel + 4 * j, &constant, 4);
        }
        uint8_t* to = panel + 4 * kColumns;
        for (int64_t k = 0; k < depth; k += 16)
            for (int half = 0; half < 2; half++) {
                __m256i quads[4];
                quads_of_8_rows(rows + half * 8 * stride + k, stride, quads);
                for (int q = 0; q < 4 && k + 4 * q < depth; q++) {
                    uint8_t* place = to + (k + 4 * q) * kColumns + 32 * half;
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), quads[q]);
                }
            }
    }

    static DSC_INLINE void quads_of_8_rows(const int16_t* rows, int64_t stride, __m256i* quads) {
        __m256i pairs[4];  // rows j and j + 4, 16 bytes each
        for (int j = 0; j < 4; j++) {
            const __m256i upper = load_as<__m256i>(rows + j * stride);
            const __m256i lower = load_as<__m256i>(rows + (j + 4) * stride);
            pairs[j] = _mm256_permute4x64_epi64(_mm256_packs_epi16(upper, lower), 0xd8);
        }
        const __m256i low01 = _mm256_unpacklo_epi32(pairs[0], pairs[1]);
        const __m256i high01 = _mm256_unpackhi_epi32(pairs[0], pairs[1]);
        const __m256i low23 = _mm256_unpacklo_epi32(pairs[2], pairs[3]);
        const __m256i high23 = _mm256_unpackhi_epi32(pairs[2], pairs[3]);
        const __m256i transposed[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                                       _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
        const __m256i halves = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13,  //
                                                2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13);
        for (int q = 0; q < 4; q++)
            quads[q] = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(transposed[q], halves), 0xd8);
    }
};

}  // namespace
}  // namespace ds_compress::cpu
