// int8 codes (m, k) times 2:4 sparse int8 weights (n, k): mma.sp skips the zeros. The sparse operand is mma's
// first, so this computes the transpose: rows are output features, columns are rows of x.
#pragma once

#include "epilogue.cuh"
#include "packed.cuh"
#include "tile.cuh"

namespace ds_compress::linear {

/// Any valid word of places: mma.sp demands increasing places even of codes that are zero.
constexpr uint32_t no_places = 0x44444444;

/// A block computes tile_n output features of tile_m rows of x; 128 columns of k a step.
template <int tile_n_, int tile_m_, int warps_n_, int warps_m_, int blocks_>
struct Sparse24Tile {
    static constexpr int tile_n = tile_n_, tile_m = tile_m_, warps_n = warps_n_, warps_m = warps_m_;
    static constexpr int threads = warps_n * warps_m * 32, blocks = blocks_, stages = 3;
    static constexpr int input_chunks = 8, weight_chunks = 4;      // of 128 columns of k
    static constexpr int place_chunks = 16, place_bytes = place_chunks * 16;  // per 16 output features
    static constexpr int rows = tile_n / warps_n / 16;    // of 16 output features, per warp
    static constexpr int columns = tile_m / warps_m / 8;  // of 8 rows of x, per warp
    static constexpr int sums_pitch = tile_n + 4;         // 8 rows of 4 columns two apart: all banks once
    static constexpr int weight_bytes = tile_n * weight_chunks * 16, input_bytes = tile_m * input_chunks * 16;
    static constexpr int stage_bytes = weight_bytes + input_bytes + tile_n / 16 * place_bytes;
    static constexpr int sums_bytes = tile_m * sums_pitch * 4;
    static constexpr int shared_bytes = stages * stage_bytes > sums_bytes ? stages * stage_bytes : sums_bytes;
};

/// Grid: (tiles of m, tiles of n).
template <class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    sparse24_gemm_kernel(const int8_t* __restrict__ codes, const void* __restrict__ packed, int64_t k, Epilogue e) {
    DSC_DYNAMIC_SHARED(int8_t, shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_n = warp % Tile::warps_n * (Tile::rows * 16), warp_m = warp / Tile::warps_n * (Tile::columns * 8);
    const int64_t first_m = static_cast<int64_t>(blockIdx.x) * Tile::tile_m;
    const int64_t first_n = static_cast<int64_t>(blockIdx.y) * Tile::tile_n;
    const int64_t input_pitch = int8_row_bytes(k), weight_pitch = sparse24_row_bytes(k);
    const TileLoader<Tile::tile_n, Tile::weight_chunks, Tile::threads> weights(packed_body(packed), weight_pitch, e.n,
                                                                               first_n);
    const TileLoader<Tile::tile_m, Tile::input_chunks, Tile::threads> inputs(codes, input_pitch, e.m, first_m);
    const TileLoader<Tile::tile_n / 16, Tile::place_chunks, Tile::threads> places(
        sparse24_places(packed, e.n, k), sparse24_places_bytes(k), (e.n + 15) / 16, first_n / 16);

    int sums[Tile::rows][Tile::columns][4] = {};
    pipeline<Tile::stages>(
        static_cast<int>((k + 127) / 128),
        [&](int stage, int step) {
            int8_t* const to = shared + stage * Tile::stage_bytes;
            weights.start(to, step * 64);
            inputs.start(to + Tile::weight_bytes, step * 128);
            places.start(to + Tile::weight_bytes + Tile::input_bytes, step * Tile::place_bytes);
        },
        [&](int stage, int) {
            const int8_t* const weight_tile = shared + stage * Tile::stage_bytes;
            const int8_t* const input_tile = weight_tile + Tile::weight_bytes;
            const auto* const place_words = reinterpret_cast<const uint32_t*>(input_tile + Tile::input_bytes);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t a[Tile::rows][4], kept[Tile::rows];
#pragma unroll
                for (int i = 0; i < Tile::rows; i++) {
                    load_16_rows<Tile::weight_chunks>(a[i], weight_tile, warp_n + i * 16, half * 2);
                    const uint32_t word = place_words[(warp_n / 16 + i) * (Tile::place_bytes / 4) + half * 32 + lane];
                    kept[i] = word == 0 ? no_places : word;  // 0: beyond the ends, where the codes are zeros
                }
#pragma unroll
                for (int j = 0; j < Tile::columns; j++) {
                    uint32_t b[4];
                    load_8_columns<Tile::input_chunks>(b, input_tile, warp_m + j * 8, half * 4);
#pragma unroll
                    for (int i = 0; i < Tile::rows; i++) mma_sp_s8_16x8x64(sums[i][j], a[i], b, kept[i]);
                }
            }
        });

    float* const staged = reinterpret_cast<float*>(shared);  // (tile_m, sums_pitch): transposed back
#pragma unroll
    for (int i = 0; i < Tile::rows; i++) {
#pragma unroll
        for (int j = 0; j < Tile::columns; j++) {
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const int m = warp_m + j * 8 + lane % 4 * 2 + s % 2, n = warp_n + i * 16 + lane / 4 + s / 2 * 8;
                staged[m * Tile::sums_pitch + n] = static_cast<float>(sums[i][j][s]);
            }
        }
    }
    __syncthreads();
    finish_tile<Tile::tile_m, Tile::tile_n, Tile::sums_pitch, Tile::threads>(e, staged, first_m, first_n);
}

}  // namespace ds_compress::linear
