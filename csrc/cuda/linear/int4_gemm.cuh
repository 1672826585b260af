// int8 values (m, k) times int4 weights (n, k) with one fp32 scale per row and group of 32, 64 or 128 columns.
//
// Weights stay int4 until a warp has them in registers: two operations unpack eight. The int32 sums of a group
// are exact; at its end they are scaled and added to the fp32 sums, group after group, as the contract orders.
#pragma once

#include "epilogue.cuh"
#include "int8_gemm.cuh"
#include "packed.cuh"
#include "tile.cuh"

namespace ds_compress::linear {

/// Eight int4 values to eight int8 numbers, each 16 times as large: the upper nibble is in place already.
DSC_DEVICE void unpack_times_16(uint32_t packed, uint32_t& low, uint32_t& high) {
    low = packed << 4 & 0xF0F0F0F0u;
    high = packed & 0xF0F0F0F0u;
}

template <int tile_m_, int tile_n_, int warps_m_, int warps_n_, int blocks_>
struct Int4Tile {
    static constexpr int tile_m = tile_m_, tile_n = tile_n_, warps_m = warps_m_, warps_n = warps_n_;
    static constexpr int threads = warps_m * warps_n * 32, blocks = blocks_, stages = 4;
    static constexpr int input_chunks = 4, weight_chunks = 2;  // 64 columns of k: 64 and 32 bytes
    static constexpr int rows = tile_m / warps_m / 16, columns = tile_n / warps_n / 16;
    static constexpr int sums_pitch = tile_n + 8;
    static constexpr int input_bytes = tile_m * input_chunks * 16;
    static constexpr int stage_bytes = input_bytes + tile_n * weight_chunks * 16;
    static constexpr int sums_bytes = tile_m * sums_pitch * 4;
    static constexpr int shared_bytes = stages * stage_bytes > sums_bytes ? stages * stage_bytes : sums_bytes;
};

/// Sixteen weight rows from `row` on, 64 columns: [2 h + r] is the packed word of row block r, columns 32 h ...
template <int chunks>
DSC_DEVICE void load_packed_columns(uint32_t (&fragment)[4], const int8_t* tile, int row) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(fragment, tile + row * chunks * 16 + chunk_offset<chunks>(lane % 16, lane / 16));
}

/// Adds the scaled sums of a group, in units of 1/16, to `totals`, and clears them. `scales`: of the group.
template <class Tile>
DSC_DEVICE void close_group(float (&totals)[Tile::rows][Tile::columns][2][4],
                            int (&sums)[Tile::rows][Tile::columns][2][4], const float* scales, int64_t column,
                            int64_t stride) {
#pragma unroll
    for (int j = 0; j < Tile::columns * 2; j++) {
        const int64_t pair = column + j * 8;  // even, and the stride is padded to 8: both scales are there
        const float2 scale = pair < stride ? *reinterpret_cast<const float2*>(scales + pair) : make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < Tile::rows; i++) {
#pragma unroll
            for (int s = 0; s < 4; s++) {
                int& sum = sums[i][j / 2][j % 2][s];
                float& total = totals[i][j / 2][j % 2][s];
                const float part = math::multiply(static_cast<float>(sum >> 4), s % 2 == 0 ? scale.x : scale.y);
                total = math::add(total, part);
                sum = 0;
            }
        }
    }
}

/// The outputs of a block: those from (first_m, first_n) on, rows up to e.m. group: 32, 64 or 128.
template <class Tile>
DSC_DEVICE void int4_gemm_block(const int8_t* __restrict__ quantized, const void* __restrict__ packed, int64_t k,
                                int group, const Epilogue& e, int64_t first_m, int64_t first_n) {
    DSC_DYNAMIC_SHARED(int8_t, shared);
    const int warp = threadIdx.x / 32;
    const int warp_m = warp % Tile::warps_m * (Tile::rows * 16), warp_n = warp / Tile::warps_m * (Tile::columns * 16);
    const int64_t input_pitch = int8_row_bytes(k), weight_pitch = int4_row_bytes(k);
    const TileLoader<Tile::tile_m, Tile::input_chunks, Tile::threads> inputs(quantized, input_pitch, e.m, first_m);
    const TileLoader<Tile::tile_n, Tile::weight_chunks, Tile::threads> weights(packed_body(packed), weight_pitch, e.n,
                                                                               first_n);
    const int64_t stride = int4_scale_stride(e.n), column = first_n + warp_n + threadIdx.x % 4 * 2;
    const float* scales = int4_scales(packed, e.n, k);  // of the group that is being summed
    const int halves = static_cast<int>((k + 31) / 32), steps = (halves + 1) / 2;

    int sums[Tile::rows][Tile::columns][2][4] = {};
    float totals[Tile::rows][Tile::columns][2][4];
#pragma unroll
    for (int i = 0; i < Tile::rows * Tile::columns * 8; i++) {
        totals[i / 8 / Tile::columns][i / 8 % Tile::columns][i / 4 % 2][i % 4] = -0.0f;  // -0 + x is x, -0 too
    }
    pipeline<Tile::stages>(
        steps,
        [&](int stage, int step) {
            int8_t* const to = shared + stage * Tile::stage_bytes;
            inputs.start(to, step * 64);
            weights.start(to + Tile::input_bytes, step * 32);
        },
        [&](int stage, int step) {
            const int8_t* const from = shared + stage * Tile::stage_bytes;
            uint32_t words[Tile::columns][4];
#pragma unroll
            for (int j = 0; j < Tile::columns; j++) {
                load_packed_columns<Tile::weight_chunks>(words[j], from + Tile::input_bytes, warp_n + j * 16);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t a[Tile::rows][4];
#pragma unroll
                for (int i = 0; i < Tile::rows; i++) {
                    load_16_rows<Tile::input_chunks>(a[i], from, warp_m + i * 16, half * 2);
                }
#pragma unroll
                for (int j = 0; j < Tile::columns * 2; j++) {
                    uint32_t low, high;
                    unpack_times_16(words[j / 2][half * 2 + j % 2], low, high);
#pragma unroll
                    for (int i = 0; i < Tile::rows; i++) mma_s8_16x8x32(sums[i][j / 2][j % 2], a[i], low, high);
                }
                const int done = step * 2 + half + 1;  // runs of 32 columns
                if (done == halves || (done < halves && done * 32 % group == 0)) {
                    close_group<Tile>(totals, sums, scales, column, stride);
                    scales += stride;
                }
            }
        });

    float* const staged = reinterpret_cast<float*>(shared);
    write_sums<Tile>(staged, totals, warp_m, warp_n);
    __syncthreads();
    finish_tile<Tile::tile_m, Tile::tile_n, Tile::sums_pitch, Tile::threads>(e, staged, first_m, first_n);
}

/// Grid: (tiles of m, tiles of n). group: 32, 64 or 128.
template <class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    int4_gemm_kernel(const int8_t* __restrict__ quantized, const void* __restrict__ packed, int64_t k, int group,
                     Epilogue e) {
    int4_gemm_block<Tile>(quantized, packed, k, group, e, static_cast<int64_t>(blockIdx.x) * Tile::tile_m,
                          static_cast<int64_t>(blockIdx.y) * Tile::tile_n);
}

}  // namespace ds_compress::linear
