// Compiled with -mavx2 -mfma -mf16c.
#include "weight_only.h"

#if defined(__AVX2__)
#include "driver.h"
#include "values.h"

namespace ds_compress::cpu {
namespace {

// The four bytes of one part of each word.
template <Storage kStorage>
DSC_INLINE __m256i unpacked(__m256i words, int part) {
    constexpr int kBits = bits_of_storage(kStorage);
    const __m256i stored = _mm256_and_si256(_mm256_srli_epi16(words, part * kBits), _mm256_set1_epi8((1 << kBits) - 1));
    if constexpr (kStorage != Storage::e2m1) return stored;
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kE2m1Values)));
    return _mm256_shuffle_epi8(table, stored);
}

// One byte of x times 4 values of `kWidth` * 8 columns, added to sums.
template <Storage kStorage, int kWidth>
DSC_INLINE void multiply_add_bytes(const __m256i* u, __m256i a, Ints* sums) {
    if constexpr (kStorage == Storage::int8) {
        // Products of bytes of all sizes, added in pairs, need more than 16 bits.
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), odd = _mm256_srai_epi16(a, 8);
        const __m256i low = _mm256_set1_epi16(255);
#pragma GCC unroll 4
        for (int c = 0; c < kWidth; c++)
            sums[c] += (Ints)_mm256_madd_epi16(_mm256_and_si256(u[c], low), even) +
                       (Ints)_mm256_madd_epi16(_mm256_srli_epi16(u[c], 8), odd);
    } else {
#pragma GCC unroll 4
        for (int c = 0; c < kWidth; c++)
            sums[c] += (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(u[c], a), _mm256_set1_epi16(1));
    }
}

struct Avx2Engine {
    static constexpr int64_t kRows = 1;
    static constexpr int kWidth = 4;  // times 8 columns, half a panel

    static DSC_INLINE void transpose(Ints bytes, uint8_t* to) {
        const __m256i order =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        store(to, _mm256_shuffle_epi8((__m256i)bytes, order));
    }

    template <Storage kStorage, int kBytes>
    [[gnu::noinline]] static void tile(const Tile& tile) {
        constexpr int kParts = 8 / bits_of_storage(kStorage);
        for_blocks<4 * kParts>(tile, [&](const uint8_t* words, int64_t count, int64_t block, int64_t quad,
                                         const float* scales) __attribute__((always_inline)) {
            const BlockHead& head = tile.heads[block];
            for (int j = 0; j < kWeightOnlyColumns; j += 8 * kWidth) {
                Ints sums[kBytes][kWidth];
                for (int byte = 0; byte < kBytes; byte++)
                    for (int c = 0; c < kWidth; c++) sums[byte][c] = splat(head.from[byte]);
                const uint8_t* x = tile.x + quad * kQuadBytes;
                for (int64_t word = 0; word < count; word++) {
                    const uint8_t* w = words + (word * kWeightOnlyColumns + j) * 4;
                    __builtin_prefetch(w + kPrefetchAhead);
                    __builtin_prefetch(w + kPrefetchAhead + 64);
#pragma GCC unroll 4
                    for (int part = 0; part < kParts; part++, x += kQuadBytes) {
                        __m256i u[kWidth];
#pragma GCC unroll 4
                        for (int c = 0; c < kWidth; c++) u[c] = unpacked<kStorage>(load_as<__m256i>(w + 32 * c), part);
#pragma GCC unroll 3
                        for (int byte = 0; byte < kBytes; byte++)
                            multiply_add_bytes<kStorage, kWidth>(u, _mm256_set1_epi32(load_as<int32_t>(x + 4 * byte)),
                                                                 sums[byte]);
                    }
                }
                for (int c = 0; c < kWidth; c++) {
                    Ints column[kBytes];
                    for (int byte = 0; byte < kBytes; byte++) column[byte] = sums[byte][c];
                    add_block<kBytes>(column, head, scales + j + 8 * c, tile.weight->has_offset,
                                      tile.values + j + 8 * c);
                }
            }
        });
    }
};

}  // namespace
}  // namespace ds_compress::cpu

const ds_compress::cpu::WeightOnlyKernels* ds_compress::cpu::weight_only_avx2() {
    static constexpr WeightOnlyKernels kTable = weight_only_table<Avx2Engine>(Isa::avx2);
    return &kTable;
}
#else
const ds_compress::cpu::WeightOnlyKernels* ds_compress::cpu::weight_only_avx2() { return nullptr; }
#endif
