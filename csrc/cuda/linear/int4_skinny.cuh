// int4 linear for up to 64 rows of x (decoding); see int8_skinny.cuh, from which it differs in this: the order of the
// fp32 additions is part of the contract, group after group. A warp multiplies whole groups and leaves their scaled
// sums in shared memory; then every output adds up the groups of this turn in their order.
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
template <int token_tiles_, int words_, int stages_, int blocks_>
struct Int4Skinny {
    static constexpr int token_tiles = token_tiles_, words = words_, stages = stages_, blocks = blocks_, features = 16;
    static constexpr int step_columns = 128, group = words * 32, groups = step_columns / group;  // of a step
    static constexpr int pitch = skinny_pitch(features);
    static constexpr int outputs = (token_tiles * 8 * features + skinny_threads - 1) / skinny_threads;  // of a thread
    static constexpr int stage_bytes = 1024 + groups * features * 4;  // weights, then scales
    static constexpr int ring_bytes = skinny_warps * stages * stage_bytes;
};

/// How many steps of a warp make a turn, and the floats of its parts. Where they are few there are two sets of them:
/// while one turn is added up, the next is multiplied.
struct Turns {
    int steps, floats;
    bool twice;

    __host__ __device__ constexpr int bytes() const { return floats * (twice ? 8 : 4); }
};

/// Long turns have fewer barriers: as many steps as have 24 KB of parts, twice 12, but one step at least.
__host__ __device__ constexpr Turns turns_of(int64_t count, int64_t k, int groups) {
    const int64_t per_step = skinny_warps * groups * count * skinny_pitch(16);
    const int64_t all = (k + skinny_warps * 128 - 1) / (skinny_warps * 128),
                  fitting = per_step > 0 ? 3072 / per_step : 1;
    const int64_t steps = fitting < 1 || all < 1 ? 1 : fitting < all ? fitting : all;
    return {static_cast<int>(steps), static_cast<int>(steps * per_step), steps * per_step <= 3072};
}

/// Grid: any number of blocks; they share out the tiles of 16 features. Dynamic shared memory: the rings, the parts,
/// then the tokens.
template <class Tile, class Given>
__global__ void __launch_bounds__(skinny_threads, Tile::blocks)
    int4_skinny_kernel(Given given, const void* __restrict__ packed, int64_t k, Turns turns, Epilogue e) {
    constexpr int words = Tile::words, group = Tile::group;
    DSC_DYNAMIC_SHARED(int8_t, shared);
    float* const parts = reinterpret_cast<float*>(shared + Tile::ring_bytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, quad_lane = lane % 4;
    const int count = static_cast<int>(e.m), groups = static_cast<int>((k + group - 1) / group);
    const int all_steps = static_cast<int>((k + Tile::step_columns - 1) / Tile::step_columns);
    const int steps = (all_steps - warp + skinny_warps - 1) / skinny_warps;  // of this warp
    const int slot_floats = count * Tile::pitch;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * Tile::features;
    const int64_t weight_pitch = int4_row_bytes(k), x_pitch = int8_row_bytes(k), scale_stride = int4_scale_stride(e.n);
    const float* const scales = int4_scales(packed, e.n, k);
    int8_t* const ring = shared + warp * Tile::stages * Tile::stage_bytes;
    int8_t* const own = shared + Tile::ring_bytes + turns.bytes();
    const auto early = given.begin(count, k, own);

    Cursor starting{static_cast<int64_t>(blockIdx.x) * Tile::features, 0};
    const auto start = [&](int stage) {
        if (starting.first >= e.n || steps == 0) return;
        const int64_t index = static_cast<int64_t>(starting.step) * skinny_warps + warp,
                      byte = index * 64 + quad_lane * 16;
        const bool exists = byte < weight_pitch;
        int8_t* const to = ring + stage * Tile::stage_bytes;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int64_t wanted = starting.first + i * 8 + row, feature = wanted < e.n ? wanted : e.n - 1;
            copy_async_16(to + (i * 8 + row) * 64 + quad_lane * 16,
                          packed_body(packed) + feature * weight_pitch + (exists ? byte : 0), exists);
        }
        if (lane < Tile::groups * 4) {  // four scales a lane, a quad per group
            const int64_t its_group = index * Tile::groups + row, feature = starting.first + quad_lane * 4;
            const bool there = its_group < groups && feature < scale_stride;
            copy_async_16(to + 1024 + lane * 16, scales + (there ? its_group * scale_stride + feature : 0), there);
        }
        starting.advance(steps, stride);
    };
    WarpRing<Tile::stages> copies;
    copies.fill(start);
    const Tokens tokens = given.template end<Tile::stages - 1>(early, count, k, own);

    // The scaled sums of the groups of one step, in slot `slot` and those behind it.
    const auto multiply = [&](int step, int slot, float* parts_of_turn) {
        const int8_t* const from = ring + copies.next(start) * Tile::stage_bytes;
        const int64_t column = (static_cast<int64_t>(step) * skinny_warps + warp) * Tile::step_columns;
#pragma unroll
        for (int g = 0; g < Tile::groups; g++) {
            const int word =
                quad_lane * words;  // of the group: it has the quantized values first .. + 3 and those 16 further
            const int64_t low_at = column + g * group + word / 4 * 32 + word % 4 * 4, high_at = low_at + 16;
            const float* const scale = reinterpret_cast<const float*>(from + 1024) + g * Tile::features + row;
            const auto upper = *reinterpret_cast<const Words<words>*>(from + row * 64 + g * group / 2 + word * 4);
            const auto lower = *reinterpret_cast<const Words<words>*>(from + (row + 8) * 64 + g * group / 2 + word * 4);
            float* const to = parts_of_turn + (slot + g) * slot_floats + row;
#pragma unroll
            for (int t = 0; t < Tile::token_tiles; t++) {
                // Beyond the end the weights are 0, and the quantized values whatever exists.
                const int8_t* const x = tokens.row(t * 8 + row);
                const auto low = *reinterpret_cast<const Words<words>*>(x + (low_at < x_pitch ? low_at : 0));
                const auto high = *reinterpret_cast<const Words<words>*>(x + (high_at < x_pitch ? high_at : 0));
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
                    const int token = t * 8 + quad_lane * 2 + s % 2;
                    if (token < count)
                        to[token * Tile::pitch + s / 2 * 8] =
                            math::multiply(static_cast<float>(sums[s] >> 4), scale[s / 2 * 8]);
                }
            }
        }
    };

    bool is_second = false;  // of the two sets of parts
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * Tile::features; first < e.n; first += stride) {
        float totals[Tile::outputs];
#pragma unroll
        for (int i = 0; i < Tile::outputs; i++) totals[i] = -0.0f;  // -0 + x is x, -0 too
        for (int begin = 0; begin * skinny_warps < all_steps; begin += turns.steps) {
            float* const parts_of_turn = parts + (is_second ? turns.floats : 0);
#pragma unroll 1
            for (int step = begin; step < begin + turns.steps && step < steps; step++)
                multiply(step, ((step - begin) * skinny_warps + warp) * Tile::groups, parts_of_turn);
            // The parts of this turn are all there; the other set, which was added up before, is free.
            __syncthreads();
            const int left = groups - begin * skinny_warps * Tile::groups,
                      most = turns.steps * skinny_warps * Tile::groups;
            const int present = left < most ? left : most;
#pragma unroll
            for (int i = 0; i < Tile::outputs; i++) {
                const int output = i * skinny_threads + threadIdx.x;
                if (output >= count * Tile::features) break;
                const float* const from =
                    parts_of_turn + output / Tile::features * Tile::pitch + output % Tile::features;
#pragma unroll 8
                for (int slot = 0; slot < present; slot++) totals[i] = math::add(totals[i], from[slot * slot_floats]);
            }
            if (turns.twice)
                is_second = !is_second;
            else
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
