// int4 linear for a single row of x; see int8_row.cuh. The sums of a feature's groups are scaled and left in shared
// memory, and after a few features each is added up by a lane, group after group, as the contract orders.
#pragma once

#include "int4_gemm.cuh"
#include "int8_row.cuh"

namespace ds_compress::linear {

constexpr int row_groups = 128;  // of a row, at most: four a lane
constexpr int row_features = 4;  // whose groups are added up together

/// 16 times the dot product of the 32 quantized values of a run with their columns of x.
DSC_DEVICE int dot_32_times_16(int4 run, int4 first, int4 second) {
    const uint32_t words[4] = {uint32_t(run.x), uint32_t(run.y), uint32_t(run.z), uint32_t(run.w)};
    const int low[4] = {first.x, first.y, first.z, first.w}, high[4] = {second.x, second.y, second.z, second.w};
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t low_half, high_half;
        unpack_times_16(words[i], low_half, high_half);
        sum = __dp4a(static_cast<int>(high_half), high[i], __dp4a(static_cast<int>(low_half), low[i], sum));
    }
    return sum;
}

/// Floats of shared memory for a warp: the sums of a feature, and the scaled sums of several, in different banks.
__host__ __device__ constexpr int row_pitch(int groups) { return groups | 1; }
__host__ __device__ constexpr int row_scratch(int groups) { return (1 + row_features) * row_pitch(groups); }

/// words: lanes that share a group, which has words * 32 columns; at most row_groups groups. Grid as int8_row_kernel.
/// Dynamic shared memory: the rings, the sums, then the quantized values of x.
template <int words, class Given>
__global__ void __launch_bounds__(skinny_threads, row_blocks)
    int4_row_kernel(Given given, const void* __restrict__ packed, int64_t k, Epilogue e) {
    constexpr int group = words * 32, per_step = 32 / words;
    DSC_DYNAMIC_SHARED(int8_t, shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, groups = static_cast<int>((k + group - 1) / group);
    const int pitch = row_pitch(groups);
    int* const sums = reinterpret_cast<int*>(shared + row_ring_bytes) + warp * row_scratch(groups);
    float* const scaled = reinterpret_cast<float*>(sums) + pitch;
    const int64_t scale_stride = int4_scale_stride(e.n);
    const float* const scales = int4_scales(packed, e.n, k);
    int8_t* const own = shared + row_ring_bytes + rounded_up(skinny_warps * row_scratch(groups) * 4, 16);
    const auto early = given.begin(1, k, own);
    RowStream stream = row_stream(packed_body(packed), shared, int4_row_bytes(k), e.n);
    WarpRing<row_stages> copies;
    copies.fill(stream);
    int64_t feature = static_cast<int64_t>(blockIdx.x) * skinny_warps + warp;
    float next_scale[4];
    const auto load_scales = [&](int64_t of) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            next_scale[i] = of < e.n && lane + i * 32 < groups ? scales[(lane + i * 32) * scale_stride + of] : 0.0f;
    };
    load_scales(feature);
    const Tokens x = given.template end<row_stages - 1>(early, 1, k, own);
    const int x_pitch = static_cast<int>(int8_row_bytes(k));

    while (feature < e.n) {
        const int64_t first = feature;
        int done = 0;
        for (; done < row_features && feature < e.n; done++) {
            float scale[4];
#pragma unroll
            for (int i = 0; i < 4; i++) scale[i] = next_scale[i];
            load_scales(feature + stream.stride);  // long before they are wanted
#pragma unroll 1
            for (int step = 0; step < stream.steps; step++) {
                const int4 run = *reinterpret_cast<const int4*>(stream.ring + copies.next(stream) * row_step);
                const int q =
                    (step * 32 + lane) * 32;  // beyond the end the weights are 0, and the quantized values anything
                const int low = q < x_pitch ? q : 0, high = q + 16 < x_pitch ? q + 16 : 0;
                int sum = dot_32_times_16(run, *reinterpret_cast<const int4*>(x.quantized + low),
                                          *reinterpret_cast<const int4*>(x.quantized + high));
#pragma unroll
                for (int distance = 1; distance < words; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
                const int its_group = step * per_step + lane / words;
                if (lane % words == 0 && its_group < groups) sums[its_group] = sum;
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int its_group = lane + i * 32;
                if (its_group < groups)
                    scaled[done * pitch + its_group] =
                        math::multiply(static_cast<float>(sums[its_group] >> 4), scale[i]);
            }
            __syncwarp();
            feature += stream.stride;
        }
        if (lane < done) {
            float total = -0.0f;  // -0 + x is x, -0 too
#pragma unroll 8
            for (int i = 0; i < groups; i++) total = math::add(total, scaled[lane * pitch + i]);
            const int64_t column = first + lane * stream.stride;
            const float value[1] = {finish(e, total, x.scales[0], column)};
            store(e, column, value, 1);
        }
        __syncwarp();
    }
}

}  // namespace ds_compress::linear
