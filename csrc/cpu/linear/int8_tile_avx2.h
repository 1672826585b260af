// The inner loop of the int8 linear layer for AVX2: exact products of 8-bit values at half the multiplications.
//
// Winograd's inner product (1968): a0 w0 + a2 w2 = (a0 + w2)(a2 + w0) - a0 a2 - w0 w2. The last two terms belong to a
// row and to a column alone and are corrected outside. A plain loop of vpmaddwd and vpaddd fights for the two multiply
// pipes of Zen 3 and ends at 72 % of their peak; this one has one multiplication in four instructions and ends at 84 %,
// the widening of the weights included. vpmaddubsw would need fewer instructions still, but saturates. Sums are modulo
// 2^32, so only the result must fit, not what is on the way.
//
// Four values of K make a quad. A row has them in order as int16: P = (a0, a1), Q = (a2, a3), one dword each. A panel
// has for 8 columns X = (w2, w3) and then Y = (w0, w1), for 16 columns X Y X' Y', as int8.
// Then vpmaddwd(P + X, Q + Y) holds (a0 + w2)(a2 + w0) + (a1 + w3)(a3 + w1).
//
// The loop is assembly because it needs exactly the 16 registers that there are: a compiler spills.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ds_compress::cpu {
namespace {

constexpr int kTileColumns = 16;

#define DSC_WEIGHTS(quad)       \
    "vpmovsxbw " #quad          \
    "*64+0(%[w]), %%ymm8\n\t"   \
    "vpmovsxbw " #quad          \
    "*64+16(%[w]), %%ymm9\n\t"  \
    "vpmovsxbw " #quad          \
    "*64+32(%[w]), %%ymm10\n\t" \
    "vpmovsxbw " #quad "*64+48(%[w]), %%ymm11\n\t"

#define DSC_ROW(quad, address, left, right)  \
    "vpbroadcastd " #quad "*8+0" address     \
    ", %%ymm12\n\t"                          \
    "vpbroadcastd " #quad "*8+4" address     \
    ", %%ymm13\n\t"                          \
    "vpaddw %%ymm8, %%ymm12, %%ymm14\n\t"    \
    "vpaddw %%ymm9, %%ymm13, %%ymm15\n\t"    \
    "vpaddw %%ymm10, %%ymm12, %%ymm12\n\t"   \
    "vpaddw %%ymm11, %%ymm13, %%ymm13\n\t"   \
    "vpmaddwd %%ymm15, %%ymm14, %%ymm14\n\t" \
    "vpmaddwd %%ymm13, %%ymm12, %%ymm12\n\t" \
    "vpaddd %%ymm14, " left ", " left        \
    "\n\t"                                   \
    "vpaddd %%ymm12, " right ", " right "\n\t"

#define DSC_ROWS_1(quad) DSC_WEIGHTS(quad) DSC_ROW(quad, "(%[a])", "%[s0]", "%[s1]")
#define DSC_ROWS_2(quad) DSC_ROWS_1(quad) DSC_ROW(quad, "(%[a],%[stride])", "%[s2]", "%[s3]")
#define DSC_ROWS_3(quad) DSC_ROWS_2(quad) DSC_ROW(quad, "(%[a],%[stride],2)", "%[s4]", "%[s5]")
#define DSC_ROWS_4(quad) DSC_ROWS_3(quad) DSC_ROW(quad, "(%[a3])", "%[s6]", "%[s7]")

#define DSC_SUMS_1 [s0] "+x"(s[0]), [s1] "+x"(s[1])
#define DSC_SUMS_2 DSC_SUMS_1, [s2] "+x"(s[2]), [s3] "+x"(s[3])
#define DSC_SUMS_3 DSC_SUMS_2, [s4] "+x"(s[4]), [s5] "+x"(s[5])
#define DSC_SUMS_4 DSC_SUMS_3, [s6] "+x"(s[6]), [s7] "+x"(s[7])

// Two quads: 8 values of K for kRows rows and 16 columns.
#define DSC_STEP(rows)                                                                          \
    asm volatile("prefetcht0 (%[next])\n\t" DSC_ROWS_##rows(0) DSC_ROWS_##rows(1)               \
                 : DSC_SUMS_##rows                                                              \
                 : [a] "r"(a), [a3] "r"(a3), [stride] "r"(stride), [w] "r"(w), [next] "r"(next) \
                 : "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", "ymm14", "ymm15", "memory")

// kRows rows of 16 sums, which start from `from` (rows `from_stride` apart) and end at `to` (rows 16 apart).
// quantized: rows `stride` bytes apart; steps: K / 8; next: weights to prefetch, for the hardware loses a stream at its
// end.
template <int kRows>
[[gnu::noinline]] void int8_tile(const int16_t* quantized, int64_t stride, const uint8_t* weights, int64_t steps,
                                 const uint8_t* next, const int32_t* from, int64_t from_stride, int32_t* to) {
    __m256i s[2 * kRows];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kRows; i++)
        s[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i / 2 * from_stride + i % 2 * 8));
    const auto* a = reinterpret_cast<const uint8_t*>(quantized);
    const uint8_t* a3 = a + 3 * stride;
    const uint8_t* w = weights;
    for (; steps > 0; steps--) {
        if constexpr (kRows == 1) DSC_STEP(1);
        if constexpr (kRows == 2) DSC_STEP(2);
        if constexpr (kRows == 3) DSC_STEP(3);
        if constexpr (kRows == 4) DSC_STEP(4);
        a += 16;
        a3 += 16;
        w += 128;
        next += kRows == 1 ? 128 : 64;
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kRows; i++) _mm256_store_si256(reinterpret_cast<__m256i*>(to + 8 * i), s[i]);
}

#undef DSC_WEIGHTS
#undef DSC_ROW
#undef DSC_ROWS_1
#undef DSC_ROWS_2
#undef DSC_ROWS_3
#undef DSC_ROWS_4
#undef DSC_SUMS_1
#undef DSC_SUMS_2
#undef DSC_SUMS_3
#undef DSC_SUMS_4
#undef DSC_STEP

}  // namespace
}  // namespace ds_compress::cpu
