// Compiled with the AVX-512 flags, VNNI among them.
#include "weight_only.h"

// gcc 12 finds its own intrinsics' "undefined" operands uninitialized.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#if defined(__AVX512VNNI__)
#include "../linear/vnni_avx512.h"
#include "driver.h"
#include "values.h"

namespace ds_compress::cpu {
namespace {

// The four bytes of part kPart of each word.
template <Storage kStorage, int kPart>
DSC_INLINE __m512i unpacked(__m512i words) {
    constexpr int kBits = bits_of_storage(kStorage);
    if constexpr (kStorage == Storage::int8) return words;
    const __m512i moved = kPart == 0 ? words : _mm512_srli_epi16(words, kPart * kBits);
    const __m512i stored = _mm512_and_si512(moved, _mm512_set1_epi8((1 << kBits) - 1));
    if constexpr (kStorage != Storage::e2m1) return stored;
    const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kE2m1Values)));
    return _mm512_shuffle_epi8(table, stored);
}

// kRows rows by kWidth * 16 columns, 4 / kWidth times.
template <Storage kStorage, int kBytes, int kRows, int kWidth>
[[gnu::noinline]] void weight_only_tile(const Tile& tile) {
    constexpr int kParts = 8 / bits_of_storage(kStorage);
    const bool has_offset = tile.weight->has_offset;
    for_blocks<4 * kParts>(tile, [&](const uint8_t* words, int64_t count, int64_t block, int64_t quad,
                                     const float* scales) __attribute__((always_inline)) {
        for (int j = 0; j < 4; j += kWidth) {
            __m512i s[kRows][kBytes][kWidth];
#pragma GCC unroll 6
            for (int r = 0; r < kRows; r++)
#pragma GCC unroll 3
                for (int byte = 0; byte < kBytes; byte++)
#pragma GCC unroll 4
                    for (int c = 0; c < kWidth; c++)
                        s[r][byte][c] = _mm512_set1_epi32(tile.heads[r * tile.heads_stride + block].from[byte]);
            const uint8_t* w = words + 64 * j;
            const uint8_t* x = tile.x + quad * kQuadBytes;
            for (int64_t word = count; word > 0; word--, w += 256) {
                __m512i packed[kWidth];
#pragma GCC unroll 4
                for (int c = 0; c < kWidth; c++) {
                    packed[c] = _mm512_loadu_si512(w + 64 * c);
                    if (kWidth == 4) __builtin_prefetch(w + kPrefetchAhead + 64 * c);
                }
                const auto multiply = [&]<int kPart>() __attribute__((always_inline)) {
                    __m512i u[kWidth];
#pragma GCC unroll 4
                    for (int c = 0; c < kWidth; c++) u[c] = unpacked<kStorage, kPart>(packed[c]);
#pragma GCC unroll 6
                    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 3
                        for (int byte = 0; byte < kBytes; byte++) {
                            const __m512i a = _mm512_set1_epi32(load_as<int32_t>(x + r * tile.x_stride + 4 * byte));
#pragma GCC unroll 4
                            for (int c = 0; c < kWidth; c++) DSC_VPDPBUSD(s[r][byte][c], u[c], a);
                        }
                    x += kQuadBytes;
                };
                multiply.template operator()<0>();
                if constexpr (kParts > 1) multiply.template operator()<1>();
                if constexpr (kParts > 2) {
                    multiply.template operator()<2>();
                    multiply.template operator()<3>();
                }
            }
#pragma GCC unroll 6
            for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
                for (int c = 0; c < kWidth; c++) {
                    Ints sums[kBytes];
#pragma GCC unroll 3
                    for (int byte = 0; byte < kBytes; byte++) sums[byte] = (Ints)s[r][byte][c];
                    const int column = 16 * (j + c);
                    add_block<kBytes>(sums, tile.heads[r * tile.heads_stride + block], scales + column, has_offset,
                                      tile.values + r * kWeightOnlyColumns + column);
                }
        }
    });
}

struct Avx512Engine {
    static constexpr int64_t kRows = 4;

    static DSC_INLINE void transpose(Ints bytes, uint8_t* to) {
        const __m512i order =
            _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        _mm512_storeu_si512(to, _mm512_shuffle_epi8((__m512i)bytes, order));
    }

    template <Storage kStorage, int kBytes>
    static void tile(const Tile& tile) {
        // As many sums as the registers hold: 24.
        static constexpr void (*kTiles[])(const Tile&) = {weight_only_tile<kStorage, kBytes, 1, 4>,
                                                          weight_only_tile<kStorage, kBytes, 2, 4>,
                                                          weight_only_tile < kStorage,
                                                          kBytes,
                                                          3,
                                                          kBytes == 2 ? 4 : 2 >,
                                                          weight_only_tile<kStorage, kBytes, 4, 2>};
        kTiles[tile.rows - 1](tile);
    }
};

}  // namespace
}  // namespace ds_compress::cpu

const ds_compress::cpu::WeightOnlyKernels* ds_compress::cpu::weight_only_avx512() {
    static constexpr WeightOnlyKernels kTable = weight_only_table<Avx512Engine>(Isa::avx512);
    return &kTable;
}
#else
const ds_compress::cpu::WeightOnlyKernels* ds_compress::cpu::weight_only_avx512() { return nullptr; }
#endif
