// int8 values (m, k) times int8 weights (n, k), both row-major with rows padded to 16 bytes: tensor cores (mma),
// a ring of asynchronous copies, int32 sums, which are exact; then the epilogue.
#pragma once

#include "epilogue.cuh"
#include "packed.cuh"
#include "tile.cuh"

namespace ds_compress::linear {

/// A block computes tile_m x tile_n outputs with warps_m x warps_n warps, 64 columns of k a step.
/// `blocks` of them are meant to share a multiprocessor, which bounds the registers of a thread.
template <int tile_m_, int tile_n_, int warps_m_, int warps_n_, int blocks_>
struct Int8Tile {
    static constexpr int tile_m = tile_m_, tile_n = tile_n_, warps_m = warps_m_, warps_n = warps_n_;
    static constexpr int threads = warps_m * warps_n * 32, blocks = blocks_;
    static constexpr int stages = 4, chunks = 4, step_bytes = chunks * 16;
    static constexpr int rows = tile_m / warps_m / 16;     // of 16 outputs, per warp
    static constexpr int columns = tile_n / warps_n / 16;  // of 16 outputs, per warp
    static constexpr int sums_pitch = tile_n + 8;          // 8 rows of 4 pairs: all banks once
    static constexpr int stage_bytes = (tile_m + tile_n) * step_bytes;
    static constexpr int sums_bytes = tile_m * sums_pitch * 4;
    static constexpr int shared_bytes = stages * stage_bytes > sums_bytes ? stages * stage_bytes : sums_bytes;
};

/// Adds one k-step from shared memory to a warp's sums.
template <class Tile>
DSC_DEVICE void multiply_step(int (&sums)[Tile::rows][Tile::columns][2][4], const int8_t* inputs, const int8_t* weights,
                              int warp_m, int warp_n) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t a[Tile::rows][4], b[Tile::columns][4];
#pragma unroll
        for (int i = 0; i < Tile::rows; i++) load_16_rows<Tile::chunks>(a[i], inputs, warp_m + i * 16, half * 2);
#pragma unroll
        for (int j = 0; j < Tile::columns; j++) {
            load_16_columns<Tile::chunks>(b[j], weights, warp_n + j * 16, half * 2);
        }
#pragma unroll
        for (int i = 0; i < Tile::rows; i++) {
#pragma unroll
            for (int j = 0; j < Tile::columns; j++) {
                mma_s8_16x8x32(sums[i][j][0], a[i], b[j][0], b[j][1]);
                mma_s8_16x8x32(sums[i][j][1], a[i], b[j][2], b[j][3]);
            }
        }
    }
}

/// A warp's sums to the block's (tile_m, sums_pitch) floats.
template <class Tile, class Sum>
DSC_DEVICE void write_sums(float* to, const Sum (&sums)[Tile::rows][Tile::columns][2][4], int warp_m, int warp_n) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < Tile::rows; i++) {
#pragma unroll
        for (int j = 0; j < Tile::columns * 2; j++) {
            const Sum(&sum)[4] = sums[i][j / 2][j % 2];
            float* const row = to + (warp_m + i * 16 + lane / 4) * Tile::sums_pitch + warp_n + j * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(row) = make_float2(static_cast<float>(sum[0]), static_cast<float>(sum[1]));
            *reinterpret_cast<float2*>(row + 8 * Tile::sums_pitch) =
                make_float2(static_cast<float>(sum[2]), static_cast<float>(sum[3]));
        }
    }
}

/// The outputs of a block: those from (first_m, first_n) on, rows up to e.m.
template <class Tile>
DSC_DEVICE void int8_gemm_block(const int8_t* __restrict__ quantized, const void* __restrict__ packed, int64_t k,
                                const Epilogue& e, int64_t first_m, int64_t first_n) {
    DSC_DYNAMIC_SHARED(int8_t, shared);
    const int warp = threadIdx.x / 32;
    const int warp_m = warp % Tile::warps_m * (Tile::rows * 16), warp_n = warp / Tile::warps_m * (Tile::columns * 16);
    const int64_t pitch = int8_row_bytes(k);
    const TileLoader<Tile::tile_m, Tile::chunks, Tile::threads> inputs(quantized, pitch, e.m, first_m);
    const TileLoader<Tile::tile_n, Tile::chunks, Tile::threads> weights(packed_body(packed), pitch, e.n, first_n);

    int sums[Tile::rows][Tile::columns][2][4] = {};
    pipeline<Tile::stages>(
        static_cast<int>((pitch + Tile::step_bytes - 1) / Tile::step_bytes),
        [&](int stage, int step) {
            int8_t* const to = shared + stage * Tile::stage_bytes;
            inputs.start(to, step * Tile::step_bytes);
            weights.start(to + Tile::tile_m * Tile::step_bytes, step * Tile::step_bytes);
        },
        [&](int stage, int) {
            const int8_t* const from = shared + stage * Tile::stage_bytes;
            multiply_step<Tile>(sums, from, from + Tile::tile_m * Tile::step_bytes, warp_m, warp_n);
        });

    float* const staged = reinterpret_cast<float*>(shared);
    write_sums<Tile>(staged, sums, warp_m, warp_n);
    __syncthreads();
    finish_tile<Tile::tile_m, Tile::tile_n, Tile::sums_pitch, Tile::threads>(e, staged, first_m, first_n);
}

/// Grid: (tiles of m, tiles of n).
template <class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    int8_gemm_kernel(const int8_t* __restrict__ quantized, const void* __restrict__ packed, int64_t k, Epilogue e) {
    int8_gemm_block<Tile>(quantized, packed, k, e, static_cast<int64_t>(blockIdx.x) * Tile::tile_m,
                          static_cast<int64_t>(blockIdx.y) * Tile::tile_n);
}

}  // namespace ds_compress::linear
