// int4 linear for up to 32 rows of x (decoding); see int8_skinny.cuh, from which it differs in this: the order of the fp32
// additions is part of the contract, group after group. A warp multiplies whole groups and leaves their scaled sums in shared
// memory; then every output adds up the groups of this turn in their order.
#pragma once

#include "epilogue.cuh"
#include "int4_gemm.cuh"
#include "packed.cuh"
#include "skinny.cuh"
#include "tokens.cuh"

namespace ds_compress::linear {

template <int count>
struct alignas(count * 4) Words {
    uint32_t word[count];
};

/// words: of a group, per lane; a group has words * 32 columns. A step of a warp is 128 columns, 64 bytes of every row.
template <int token_tiles_, int words_, int stages_>
struct Int4Skinny {
    static constexpr int token_tiles = token_tiles_, words = words_, stages = stages_, features = 16;
    static constexpr int step_columns = 128, group = words * 32, groups = step_columns / group;  // of a step
    static constexpr int turn = skinny_warps * groups;                                           // groups of a turn
    static constexpr int pitch = skinny_pitch(features), cells = token_tiles * 8 * pitch;
    static constexpr int outputs = (token_tiles * 8 * features + skinny_threads - 1) / skinny_threads;  // of a thread
    static constexpr int stage_bytes = 1024 + groups * features * 4;  // weights, then scales
    static constexpr int ring_bytes = skinny_warps * stages * stage_bytes, part_bytes = turn * cells * 4;
};

/// Grid: any number of blocks; they share out the tiles of 16 features. Dynamic shared memory: the rings, the parts, then the
/// tokens that the block quantizes itself.
template <class Tile, class Given>
__global__ void __launch_bounds__(skinny_threads, 3)
    int4_skinny_kernel(Given given, const void* __restrict__ packed, int64_t k, Epilogue e) {
    constexpr int words = Tile::words, group = Tile::group;
    DSC_DYNAMIC_SHARED(int8_t, shared);
    float* const parts = reinterpret_cast<float*>(shared + Tile::ring_bytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, quad_lane = lane % 4;
    const int count = static_cast<int>(e.m), groups = static_cast<int>((k + group - 1) / group);
    const int all_steps = static_cast<int>((k + Tile::step_columns - 1) / Tile::step_columns);
    const int steps = (all_steps - warp + skinny_warps - 1) / skinny_warps;  // of this warp
    const int64_t weight_pitch = int4_row_bytes(k), code_pitch = int8_row_bytes(k), stride = int4_scale_stride(e.n);
    const float* const scales = int4_scales(packed, e.n, k);
    int8_t* const ring = shared + warp * Tile::stages * Tile::stage_bytes;
    const Tokens tokens = tokens_of(given, count, k, shared + Tile::ring_bytes + Tile::part_bytes);
    __syncthreads();

    for (int64_t first = static_cast<int64_t>(blockIdx.x) * Tile::features; first < e.n;
         first += static_cast<int64_t>(gridDim.x) * Tile::features) {
        const int8_t* weights[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int64_t feature = first + i * 8 + row;
            weights[i] = packed_body(packed) + (feature < e.n ? feature : e.n - 1) * weight_pitch;
        }
        const auto start = [&](int stage, int step) {
            const int64_t index = static_cast<int64_t>(step) * skinny_warps + warp, byte = index * 64 + quad_lane * 16;
            const bool exists = byte < weight_pitch;
            int8_t* const to = ring + stage * Tile::stage_bytes;
#pragma unroll
            for (int i = 0; i < 2; i++)
                copy_async_16(to + (i * 8 + row) * 64 + quad_lane * 16, weights[i] + (exists ? byte : 0), exists);
            if (lane < Tile::groups * 4) {  // four scales a lane, a quad per group
                const int64_t its_group = index * Tile::groups + row, feature = first + quad_lane * 4;
                const bool there = its_group < groups && feature < stride;
                copy_async_16(to + 1024 + lane * 16, scales + (there ? its_group * stride + feature : 0), there);
            }
        };
        float totals[Tile::outputs];
#pragma unroll
        for (int i = 0; i < Tile::outputs; i++) totals[i] = -0.0f;  // -0 + x is x, -0 too
        const auto use = [&](int stage, int step) {
            const int8_t* const from = ring + stage * Tile::stage_bytes;
            const int64_t column = (static_cast<int64_t>(step) * skinny_warps + warp) * Tile::step_columns;
#pragma unroll
            for (int g = 0; g < Tile::groups; g++) {
                const int word = quad_lane * words;  // of the group: it has the codes first .. + 3 and those 16 further
                const int64_t low_at = column + g * group + word / 4 * 32 + word % 4 * 4, high_at = low_at + 16;
                const float* const scale = reinterpret_cast<const float*>(from + 1024) + g * Tile::features + row;
                const auto upper = *reinterpret_cast<const Words<words>*>(from + row * 64 + g * group / 2 + word * 4);
                const auto lower = *reinterpret_cast<const Words<words>*>(from + (row + 8) * 64 + g * group / 2 + word * 4);
                float* const to = parts + (warp * Tile::groups + g) * Tile::cells + quad_lane * 2 * Tile::pitch + row;
#pragma unroll
                for (int t = 0; t < Tile::token_tiles; t++) {
                    // Beyond the end the weights are 0, and the codes any that exist.
                    const int8_t* const x = tokens.row(t * 8 + row);
                    const auto low = *reinterpret_cast<const Words<words>*>(x + (low_at < code_pitch ? low_at : 0));
                    const auto high = *reinterpret_cast<const Words<words>*>(x + (high_at < code_pitch ? high_at : 0));
                    int sums[4] = {};
#pragma unroll
                    for (int j = 0; j < words; j++) {
                        uint32_t a[4];
                        unpack_times_16(upper.word[j], a[0], a[2]);
                        unpack_times_16(lower.word[j], a[1], a[3]);
                        mma_s8_16x8x32(sums, a, low.word[j], high.word[j]);
                    }
#pragma unroll
                    for (int s = 0; s < 4; s++) {
                        to[(t * 8 + s % 2) * Tile::pitch + s / 2 * 8] =
                            math::multiply(static_cast<float>(sums[s] >> 4), scale[s / 2 * 8]);
                    }
                }
            }
        };

        WarpRing<Tile::stages> copies;
        copies.fill(steps, start);
        for (int turn = 0; turn * skinny_warps < all_steps; turn++) {
            copies.advance(turn, turn < steps ? turn + 1 : turn, steps, start, use);
            __syncthreads();
            const int left = groups - turn * Tile::turn, present = left < Tile::turn ? left : Tile::turn;
#pragma unroll
            for (int i = 0; i < Tile::outputs; i++) {
                const int output = i * skinny_threads + threadIdx.x;
                if (output >= count * Tile::features) break;
                const float* const from = parts + output / Tile::features * Tile::pitch + output % Tile::features;
                for (int slot = 0; slot < present; slot++) totals[i] = math::add(totals[i], from[slot * Tile::cells]);
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < Tile::outputs; i++) {
            const int output = i * skinny_threads + threadIdx.x, token = output / Tile::features;
            const int64_t column = first + output % Tile::features;
            if (output >= count * Tile::features || column >= e.n) continue;
            const float value[1] = {finish(e, totals[i], tokens.scales[token], column)};
            store(e, token * e.n + column, value, 1);
        }
    }
}

}  // namespace ds_compress::linear
