// The int8 engine (see int8_driver.h) for AMX: that of AVX-512 with its packed weights and its bits, whose tiles of 16
// rows are multiplied by the matrix unit. To be included in linear_avx512.cpp.
//
// A panel is a row of three tiles: 16 times 4 values of K lie as the matrix unit wants them. Fewer rows, and what K has
// beyond whole tiles, are multiplied as before.
#pragma once

#include "../amx.h"
#include "int8_avx512.h"

namespace ds_compress::cpu {
namespace {

// 16 rows of sums, with all of `depth` in whole tiles. The processor foresees what it reads well enough.
[[gnu::noinline]] void int8_amx_tile(const uint8_t* quantized, int64_t stride, const uint8_t* weights, int64_t depth,
                                     const int32_t* from, int64_t from_stride, int32_t* to) {
    constexpr int64_t kPanelRow = 4 * Int8Avx512::kColumns;
    load_tile<0>(from, 4 * from_stride);
    load_tile<1>(from + 16, 4 * from_stride);
    load_tile<2>(from + 32, 4 * from_stride);
    for (; depth > 0; depth -= kTileRowBytes, quantized += kTileRowBytes, weights += kTileRows * kPanelRow) {
        load_tile<3>(quantized, stride);
        load_tile<4>(weights, kPanelRow);
        multiply_tiles_u8s8<0, 3, 4>();
        load_tile<5>(weights + 64, kPanelRow);
        multiply_tiles_u8s8<1, 3, 5>();
        load_tile<6>(weights + 128, kPanelRow);
        multiply_tiles_u8s8<2, 3, 6>();
    }
    store_tile<0>(to, kPanelRow);
    store_tile<1>(to + 16, kPanelRow);
    store_tile<2>(to + 32, kPanelRow);
}

struct Int8Amx : Int8Avx512 {
    using Session = Tiles;
    static constexpr int kRows = kTileRows;
    static constexpr int64_t kChunk = 512;  // weights of a panel, which stay in the first-level cache

    static void tile(int64_t rows, const uint8_t* quantized, int64_t stride, const uint8_t* weights, int64_t depth,
                     const uint8_t* next, const int32_t* from, int64_t from_stride, int32_t* to) {
        const int64_t whole = rows == kRows ? depth / kTileRowBytes * kTileRowBytes : 0;
        if (whole > 0) {
            int8_amx_tile(quantized, stride, weights, whole, from, from_stride, to);
            if (whole == depth) return;
            from = to, from_stride = kColumns;
        }
        for (int64_t m = 0; m < rows; m += Int8Avx512::kRows) {
            const int64_t few = rows - m < Int8Avx512::kRows ? rows - m : Int8Avx512::kRows;
            Int8Avx512::tile(few, quantized + m * stride + whole, stride, weights + whole * kColumns, depth - whole,
                             next, from + m * from_stride, from_stride, to + m * kColumns);
        }
    }
};

}  // namespace
}  // namespace ds_compress::cpu
