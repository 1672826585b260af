// The int4 engine (see int4_driver.h) for AVX2. To be included in linear_avx2.cpp.
//
// Weights are 0 to 15 and quantized values -128 to 127, so a vpmaddubsw of theirs is at most 3840 and 8 of them, the 32
// columns of a block, fit into int16: one multiplication and one addition do the work of three of each in the int8
// layer.
#pragma once

#include "int4_driver.h"

namespace ds_compress::cpu {
namespace {

struct Int8Values {
    using Stored = int8_t;
    static DSC_INLINE int store(int8_t* to, Ints a, Ints b) {
        const __m256i lanes = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)a, (__m256i)b), 0xd8);
        const __m128i quantized = _mm_packs_epi16(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), quantized);
        return 0;
    }
    struct Correction {
        DSC_INLINE void add(int) {}
    };
};

#define DSC_UNPACK(step)                  \
    "vmovdqu " #step                      \
    "*64+0(%[w]), %%ymm10\n\t"            \
    "vmovdqu " #step                      \
    "*64+32(%[w]), %%ymm11\n\t"           \
    "vpand %[mask], %%ymm10, %%ymm8\n\t"  \
    "vpand %[mask], %%ymm11, %%ymm9\n\t"  \
    "vpsrlw $4, %%ymm10, %%ymm10\n\t"     \
    "vpsrlw $4, %%ymm11, %%ymm11\n\t"     \
    "vpand %[mask], %%ymm10, %%ymm10\n\t" \
    "vpand %[mask], %%ymm11, %%ymm11\n\t"

#define DSC_HALF(offset, address, low, high, left, right) \
    "vpbroadcastd " offset address                        \
    ", %%ymm12\n\t"                                       \
    "vpmaddubsw %%ymm12, " low                            \
    ", %%ymm13\n\t"                                       \
    "vpaddw %%ymm13, " left ", " left                     \
    "\n\t"                                                \
    "vpmaddubsw %%ymm12, " high                           \
    ", %%ymm12\n\t"                                       \
    "vpaddw %%ymm12, " right ", " right "\n\t"

#define DSC_ROW(step, address, left, right)                          \
    DSC_HALF(#step "*8+0", address, "%%ymm8", "%%ymm9", left, right) \
    DSC_HALF(#step "*8+4", address, "%%ymm10", "%%ymm11", left, right)

#define DSC_ROWS_1(step) DSC_UNPACK(step) DSC_ROW(step, "(%[a])", "%[s0]", "%[s1]")
#define DSC_ROWS_2(step) DSC_ROWS_1(step) DSC_ROW(step, "(%[a],%[stride])", "%[s2]", "%[s3]")
#define DSC_ROWS_3(step) DSC_ROWS_2(step) DSC_ROW(step, "(%[a],%[stride],2)", "%[s4]", "%[s5]")
#define DSC_ROWS_4(step) DSC_ROWS_3(step) DSC_ROW(step, "(%[a3])", "%[s6]", "%[s7]")

#define DSC_SUMS_1 [s0] "+x"(s[0]), [s1] "+x"(s[1])
#define DSC_SUMS_2 DSC_SUMS_1, [s2] "+x"(s[2]), [s3] "+x"(s[3])
#define DSC_SUMS_3 DSC_SUMS_2, [s4] "+x"(s[4]), [s5] "+x"(s[5])
#define DSC_SUMS_4 DSC_SUMS_3, [s6] "+x"(s[6]), [s7] "+x"(s[7])

// A block: 32 columns of K for kRows rows and 16 columns.
#define DSC_BLOCK(rows)                                                                                               \
    asm volatile(DSC_ROWS_##rows(0) DSC_ROWS_##rows(1) DSC_ROWS_##rows(2) DSC_ROWS_##rows(3)                          \
                 : DSC_SUMS_##rows                                                                                    \
                 : [a] "r"(a), [a3] "r"(a + 3 * tile.stride), [stride] "r"(tile.stride), [w] "r"(w), [mask] "x"(mask) \
                 : "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", "memory")

template <int kRows>
[[gnu::noinline]] void int4_tile(const Int4Tile& tile) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const int8_t* a = tile.quantized;
    const uint8_t* w = tile.weights;
    int64_t group = 0, in_group = 0;
    for (int64_t block = 0; block < tile.blocks; block++, a += 32, w += 256) {
        __m256i s[2 * kRows];
#pragma GCC unroll 8
        for (int i = 0; i < 2 * kRows; i++) s[i] = _mm256_setzero_si256();
        if constexpr (kRows == 1) DSC_BLOCK(1);
        if constexpr (kRows == 2) DSC_BLOCK(2);
        if constexpr (kRows == 3) DSC_BLOCK(3);
        if constexpr (kRows == 4) DSC_BLOCK(4);
        const bool ends = in_group + 1 == tile.blocks_per_group || block + 1 == tile.blocks;
#pragma GCC unroll 8
        for (int i = 0; i < 2 * kRows; i++) {
            auto* partial = reinterpret_cast<__m256i*>(tile.partial + 8 * i);
            __m256i sum = _mm256_madd_epi16(s[i], ones);
            if (in_group > 0) sum = _mm256_add_epi32(sum, *partial);
            if (!ends) {
                *partial = sum;
                continue;
            }
            sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(tile.excess[i / 2 * tile.groups + group]));
            const __m256 scale = _mm256_loadu_ps(tile.scales + group * 16 + i % 2 * 8);
            __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale);
            if (group > 0) value = _mm256_add_ps(_mm256_load_ps(tile.values + 8 * i), value);
            _mm256_store_ps(tile.values + 8 * i, value);
        }
        in_group = ends ? 0 : in_group + 1;
        group += ends;
    }
}

#undef DSC_UNPACK
#undef DSC_HALF
#undef DSC_ROW
#undef DSC_ROWS_1
#undef DSC_ROWS_2
#undef DSC_ROWS_3
#undef DSC_ROWS_4
#undef DSC_SUMS_1
#undef DSC_SUMS_2
#undef DSC_SUMS_3
#undef DSC_SUMS_4
#undef DSC_BLOCK

struct Int4Avx2 {
    using Values = Int8Values;
    static constexpr int kColumns = 16;
    static constexpr int64_t kRows = 4;

    static void multiply(int64_t rows, const Int4Tile& tile) {
        switch (rows) {
            case 1:
                return int4_tile<1>(tile);
            case 2:
                return int4_tile<2>(tile);
            case 3:
                return int4_tile<3>(tile);
            default:
                return int4_tile<4>(tile);
        }
    }
};

}  // namespace
}  // namespace ds_compress::cpu
