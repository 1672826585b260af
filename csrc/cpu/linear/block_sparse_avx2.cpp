// Compiled with -mavx2 -mfma -mf16c.
#include "block_sparse.h"

#if defined(__AVX2__)
#include "block_sparse_driver.h"

namespace ds_compress::cpu {
namespace {

// int16 in order; nothing has to be corrected. vpmaddwd is exact, where vpmaddubsw would saturate.
struct OrderedInt16Values {
    using Stored = int16_t;
    static DSC_INLINE int store(int16_t* to, Ints a, Ints b) {
        const __m256i lanes = _mm256_packs_epi32((__m256i)a, (__m256i)b);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(lanes, 0xd8));
        return 0;
    }
    struct Correction {
        DSC_INLINE void add(int) {}
        DSC_INLINE int32_t total() const { return 0; }
    };
};

// A group's blocks for kRows rows: 4 sums a row, added to rows of `to` that are kStripOutputs apart.
template <int kRows>
[[gnu::noinline]] void block_sparse_group(const int16_t* quantized, const uint16_t* inputs, const int8_t* values,
                                          int64_t count, int32_t* to) {
    __m256i s[kRows][kBlockOutputs];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
        for (int o = 0; o < kBlockOutputs; o++) s[r][o] = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i++, values += kSparseBlockBytes) {
        const int16_t* a = quantized + static_cast<int64_t>(inputs[i]) * (kRows * kBlockInputs);
        __m256i x[kRows];
#pragma GCC unroll 2
        for (int r = 0; r < kRows; r++) x[r] = load_as<__m256i>(a + r * kBlockInputs);
#pragma GCC unroll 4
        for (int o = 0; o < kBlockOutputs; o++) {
            const __m256i w = _mm256_cvtepi8_epi16(load_as<__m128i>(values + o * kBlockInputs));
#pragma GCC unroll 2
            for (int r = 0; r < kRows; r++) {
                const __m256i product = _mm256_madd_epi16(x[r], w);
                // In assembly because gcc 12 copies every sum once more, and one of them to the stack.
                asm("vpaddd %1, %0, %0" : "+x"(s[r][o]) : "x"(product));
            }
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRows; r++) {
        const __m256i pairs =
            _mm256_hadd_epi32(_mm256_hadd_epi32(s[r][0], s[r][1]), _mm256_hadd_epi32(s[r][2], s[r][3]));
        const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        auto* at = reinterpret_cast<__m128i*>(to + r * kStripOutputs);
        _mm_storeu_si128(at, _mm_add_epi32(_mm_loadu_si128(at), sum));
    }
}

struct BlockSparseAvx2 {
    using Values = OrderedInt16Values;
    static constexpr int kRows = 2;

    static int32_t start(const int32_t*, int64_t) { return 0; }

    static void tile(int64_t rows, const int16_t* quantized, const StripPart& part, int32_t* sums) {
        const auto group = rows == 2 ? block_sparse_group<2> : block_sparse_group<1>;
        int64_t begin = part.begin;
        for (int g = 0; g < kStripGroups; g++) {
            const int64_t end = part.ends[g];
            group(quantized, part.inputs + begin, part.values + begin * kSparseBlockBytes, end - begin,
                  sums + g * kBlockOutputs);
            begin = end;
        }
    }
};

}  // namespace
}  // namespace ds_compress::cpu

const ds_compress::cpu::BlockSparseKernels* ds_compress::cpu::block_sparse_avx2() {
    static constexpr BlockSparseKernels kTable = block_sparse_table<BlockSparseDriver<BlockSparseAvx2>>(Isa::avx2);
    return &kTable;
}
#else
const ds_compress::cpu::BlockSparseKernels* ds_compress::cpu::block_sparse_avx2() { return nullptr; }
#endif
