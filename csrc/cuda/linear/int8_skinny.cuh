// int8 linear for up to 32 rows of x (decoding): the weights are read once, at the speed of memory.
//
// A block owns 16 features per feature tile, its warps share out k. A lane copies 16 neighbouring values of a row to
// shared memory and reads those same back as operands of two products: the order of k within a product of integers is
// free, and the lane with the same place in the other operand took the same columns.
#pragma once

#include "epilogue.cuh"
#include "packed.cuh"
#include "skinny.cuh"
#include "tokens.cuh"

namespace ds_compress::linear {

template <int token_tiles_, int feature_tiles_, int stages_, int blocks_>
struct Int8Skinny {
    static constexpr int token_tiles = token_tiles_, feature_tiles = feature_tiles_, stages = stages_, blocks = blocks_;
    static constexpr int features = feature_tiles * 16, chunks = feature_tiles * 2;  // of 16 bytes, a lane and step
    static constexpr int pitch = skinny_pitch(features), cells = token_tiles * 8 * pitch;
    static constexpr int ring_bytes = skinny_warps * stages * chunks * 512;
};

/// Grid: any number of blocks; they share out the tiles of features. Dynamic shared memory: the rings, then the tokens.
template <class Tile, class Given>
__global__ void __launch_bounds__(skinny_threads, Tile::blocks)
    int8_skinny_kernel(Given given, const void* __restrict__ packed, int64_t k, Epilogue e) {
    constexpr int step_bytes = 64;
    DSC_DYNAMIC_SHARED(int8_t, shared);
    DSC_SHARED(int, totals, 2 * Tile::cells);  // of two tiles: one is finished while the next is summed
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, place = lane % 4 * 16;
    const int count = static_cast<int>(e.m);
    const int64_t pitch = int8_row_bytes(k), stride = static_cast<int64_t>(gridDim.x) * Tile::features;
    const int all_steps = static_cast<int>((pitch + step_bytes - 1) / step_bytes);
    const int steps = (all_steps - warp + skinny_warps - 1) / skinny_warps;  // of this warp
    int8_t* const ring = shared + (warp * Tile::stages * Tile::chunks * 32 + lane) * 16;
    int8_t* const own = shared + Tile::ring_bytes;
    const auto early = given.begin(count, k, own);

    Cursor starting{static_cast<int64_t>(blockIdx.x) * Tile::features, 0};
    const auto start = [&](int stage) {
        if (starting.first >= e.n || steps == 0) return;
        const int64_t byte = static_cast<int64_t>(starting.step * skinny_warps + warp) * step_bytes + place;
        const bool exists = byte < pitch;
        int8_t* const to = ring + stage * Tile::chunks * 512;
#pragma unroll
        for (int i = 0; i < Tile::chunks; i++) {
            const int64_t wanted = starting.first + i * 8 + row, feature = wanted < e.n ? wanted : e.n - 1;
            copy_async_16(to + i * 512, packed_body(packed) + feature * pitch + (exists ? byte : 0), exists);
        }
        starting.advance(steps, stride);
    };
    WarpRing<Tile::stages> copies;
    copies.fill(start);
    for (int i = threadIdx.x; i < 2 * Tile::cells; i += skinny_threads) totals[i] = 0;
    const Tokens tokens = given.template end<Tile::stages - 1>(early, count, k, own);

    int* sums_of_tile = totals;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * Tile::features; first < e.n; first += stride) {
        int sums[Tile::feature_tiles][Tile::token_tiles][4] = {};
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            const int8_t* const from = ring + copies.next(start) * Tile::chunks * 512;
            int4 weight[Tile::chunks];
#pragma unroll
            for (int i = 0; i < Tile::chunks; i++) weight[i] = *reinterpret_cast<const int4*>(from + i * 512);
            // Beyond the end the weights are 0, and the quantized values whatever exists.
            const int64_t byte = static_cast<int64_t>(step * skinny_warps + warp) * step_bytes + place;
#pragma unroll
            for (int t = 0; t < Tile::token_tiles; t++) {
                const int4 x = *reinterpret_cast<const int4*>(tokens.row(t * 8 + row) + (byte < pitch ? byte : 0));
#pragma unroll
                for (int f = 0; f < Tile::feature_tiles; f++) {
                    const int4 a = weight[f * 2], b = weight[f * 2 + 1];
                    const uint32_t front[4] = {uint32_t(a.x), uint32_t(b.x), uint32_t(a.y), uint32_t(b.y)};
                    const uint32_t back[4] = {uint32_t(a.z), uint32_t(b.z), uint32_t(a.w), uint32_t(b.w)};
                    mma_s8_16x8x32(sums[f][t], front, uint32_t(x.x), uint32_t(x.y));
                    mma_s8_16x8x32(sums[f][t], back, uint32_t(x.z), uint32_t(x.w));
                }
            }
        }
#pragma unroll
        for (int i = 0; i < Tile::feature_tiles * Tile::token_tiles * 4; i++) {
            const int f = i / 4 / Tile::token_tiles, t = i / 4 % Tile::token_tiles, s = i % 4;
            const int token = t * 8 + lane % 4 * 2 + s % 2, feature = f * 16 + s / 2 * 8 + row;
            if (token < count) atomicAdd(sums_of_tile + token * Tile::pitch + feature, sums[f][t][s]);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < count * Tile::features; i += skinny_threads) {
            const int token = i / Tile::features, feature = i % Tile::features;
            const int64_t column = first + feature;
            int& total = sums_of_tile[token * Tile::pitch + feature];
            if (column < e.n) {
                const float value[1] = {finish(e, static_cast<float>(total), tokens.scales[token], column)};
                store(e, token * e.n + column, value, 1);
            }
            total = 0;
        }
        // Whoever adds to these totals again has passed the barrier of the tile in between.
        sums_of_tile = sums_of_tile == totals ? totals + Tile::cells : totals;
    }
}

}  // namespace ds_compress::linear
