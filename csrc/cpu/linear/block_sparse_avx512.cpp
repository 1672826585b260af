// Compiled with the AVX-512 flags, VNNI among them.
#include "block_sparse.h"

// gcc 12 finds its own intrinsics' "undefined" operands uninitialized.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#if defined(__AVX512VNNI__)
#include "block_sparse_driver.h"
#include "int8_avx512.h"

namespace ds_compress::cpu {
namespace {

constexpr int kGroupsAtOnce = 4;  // 16 outputs: a register of finished sums

// For kRows rows, a group's sums in four parts: lane 4 o + i has what bytes 4 i to 4 i + 3 of a block gave output o.
// Few rows spread their blocks over kCopies registers of sums, which do not wait for each other.
template <int kRows>
[[gnu::noinline]] void block_sparse_group(const uint8_t* quantized, const uint16_t* inputs, const int8_t* values,
                                          int64_t count, int32_t* to) {
    constexpr int kCopies = kRows == 1 ? 4 : kRows <= 4 ? 2 : 1;
    __m512i s[kCopies][kRows];
#pragma GCC unroll 4
    for (int c = 0; c < kCopies; c++)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++) s[c][r] = _mm512_setzero_si512();
    const auto add = [&](__m512i* sums, int64_t i) __attribute__((always_inline)) {
        const __m512i w = _mm512_loadu_si512(values + i * kSparseBlockBytes);
        const uint8_t* a = quantized + static_cast<int64_t>(inputs[i]) * (kRows * kBlockInputs);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++) {
            const __m512i x =
                _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + r * kBlockInputs)));
            DSC_VPDPBUSD(sums[r], x, w);
        }
    };
    int64_t i = 0;
    for (; i + kCopies <= count; i += kCopies) {
        if constexpr (kRows <= 4) __builtin_prefetch(values + i * kSparseBlockBytes + 4096);
#pragma GCC unroll 4
        for (int c = 0; c < kCopies; c++) add(s[c], i + c);
    }
    if constexpr (kCopies > 1)
        for (; i < count; i++) add(s[0], i);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
        __m512i sum = s[0][r];
#pragma GCC unroll 4
        for (int c = 1; c < kCopies; c++) sum = _mm512_add_epi32(sum, s[c][r]);
        _mm512_storeu_si512(to + 16 * r, sum);
    }
}

// The sums of 16 outputs from those of their 4 groups, each in four parts.
DSC_INLINE __m512i whole_sums(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i sums = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, sums);
}

struct BlockSparseAvx512 {
    using Values = Uint8Values;
    static constexpr int kRows = 16;

    static int32_t start(const int32_t* corrections, int64_t output) { return corrections[output]; }

    static void tile(int64_t rows, const uint8_t* quantized, const StripPart& part, int32_t* sums) {
        using Group = decltype(block_sparse_group<1>);
        static constexpr Group* kGroups[] = {
            block_sparse_group<1>,  block_sparse_group<2>,  block_sparse_group<3>,  block_sparse_group<4>,
            block_sparse_group<5>,  block_sparse_group<6>,  block_sparse_group<7>,  block_sparse_group<8>,
            block_sparse_group<9>,  block_sparse_group<10>, block_sparse_group<11>, block_sparse_group<12>,
            block_sparse_group<13>, block_sparse_group<14>, block_sparse_group<15>, block_sparse_group<16>};
        Group* const group = kGroups[rows - 1];
        alignas(64) int32_t parts[kGroupsAtOnce][kRows * 16];
        int64_t begin = part.begin;
        for (int first = 0; first < kStripGroups; first += kGroupsAtOnce) {
            for (int g = 0; g < kGroupsAtOnce; g++) {
                const int64_t end = part.ends[first + g];
                group(quantized, part.inputs + begin, part.values + begin * kSparseBlockBytes, end - begin, parts[g]);
                begin = end;
            }
            for (int64_t r = 0; r < rows; r++) {
                int32_t* to = sums + r * kStripOutputs + first * kBlockOutputs;
                const auto of = [&](int g) { return _mm512_load_si512(parts[g] + 16 * r); };
                const __m512i whole = whole_sums(of(0), of(1), of(2), of(3));
                _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_loadu_si512(to), whole));
            }
        }
    }
};

}  // namespace
}  // namespace ds_compress::cpu

const ds_compress::cpu::BlockSparseKernels* ds_compress::cpu::block_sparse_avx512() {
    static constexpr BlockSparseKernels kTable = block_sparse_table<BlockSparseDriver<BlockSparseAvx512>>(Isa::avx512);
    return &kTable;
}
#else
const ds_compress::cpu::BlockSparseKernels* ds_compress::cpu::block_sparse_avx512() { return nullptr; }
#endif
