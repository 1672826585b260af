// int4 linear for one to eight rows of x (decoding): one warp per output feature, 32 columns a lane.
//
// The order of the fp32 additions is part of the contract (group after group), so lanes do not add in a tree: they
// put the scaled sums of their groups into shared memory, and lane r adds those of row r in order.
#pragma once

#include "epilogue.cuh"
#include "int4_gemm.cuh"
#include "int8_gemv.cuh"
#include "packed.cuh"

namespace ds_compress::linear {

/// 16 times the dot product of 32 int4 codes with 32 int8 codes.
DSC_DEVICE int dot_32_times_16(int4 weight, const int4* input) {
    const unsigned words[4] = {static_cast<unsigned>(weight.x), static_cast<unsigned>(weight.y),
                               static_cast<unsigned>(weight.z), static_cast<unsigned>(weight.w)};
    const int4 first = input[0], second = input[1];
    const int low_inputs[4] = {first.x, first.y, first.z, first.w};
    const int high_inputs[4] = {second.x, second.y, second.z, second.w};
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t low, high;
        unpack_times_16(words[i], low, high);
        sum = __dp4a(static_cast<int>(high), high_inputs[i], __dp4a(static_cast<int>(low), low_inputs[i], sum));
    }
    return sum;
}

/// e.m <= rows; group: 32, 64 or 128. Grid: n / gemv_warps.
template <int rows>
__global__ void __launch_bounds__(gemv_warps * 32)
    int4_gemv_kernel(const int8_t* __restrict__ codes, const void* __restrict__ packed, int64_t k, int group,
                     Epilogue e) {
    const int lanes_per_group = group / 32, groups_per_turn = 32 / lanes_per_group;
    DSC_SHARED(float, parts, gemv_warps * rows * 32);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * gemv_warps + warp;
    if (column >= e.n) return;
    const int64_t input_pitch = int8_row_bytes(k), weight_pitch = int4_row_bytes(k);
    const int8_t* const weights = packed_body(packed) + column * weight_pitch;
    const int64_t stride = int4_scale_stride(e.n), groups = (k + group - 1) / group;
    const float* const scales = int4_scales(packed, e.n, k) + column;
    float* const mine = parts + warp * rows * 32;

    float total = -0.0f;  // of row `lane`; -0 + x is x
    for (int64_t turn = 0; turn * 1024 < k; turn++) {
        const int64_t first = turn * 1024 + lane * 32;  // of my 32 columns
        const int64_t my_group = turn * groups_per_turn + lane / lanes_per_group;
        int4 weight = make_int4(0, 0, 0, 0);
        if (first < k) weight = *reinterpret_cast<const int4*>(weights + first / 2);
        const float scale = my_group < groups ? scales[my_group * stride] : 0.0f;
#pragma unroll
        for (int r = 0; r < rows; r++) {
            int sum = 0;
            if (r < e.m && first < k) {
                int4 input[2] = {make_int4(0, 0, 0, 0), make_int4(0, 0, 0, 0)};
                const int8_t* const from = codes + r * input_pitch + first;
                input[0] = *reinterpret_cast<const int4*>(from);
                if (first + 16 < input_pitch) input[1] = *reinterpret_cast<const int4*>(from + 16);
                sum = dot_32_times_16(weight, input);
            }
            for (int distance = 1; distance < lanes_per_group; distance *= 2) {
                sum += __shfl_xor_sync(~0u, sum, distance);
            }
            const float part = math::multiply(static_cast<float>(sum >> 4), scale);
            if (lane % lanes_per_group == 0) mine[r * 32 + lane / lanes_per_group] = part;
        }
        __syncwarp();
        if (lane < rows) {
            const int64_t left = groups - turn * groups_per_turn;
            const int count = left < groups_per_turn ? static_cast<int>(left) : groups_per_turn;
            for (int i = 0; i < count; i++) total = math::add(total, mine[lane * 32 + i]);
        }
        __syncwarp();
    }
    if (lane >= e.m) return;
    const float value[1] = {finish(e, total, e.input_scale[lane], column)};
    store(e, lane * e.n + column, value, 1);
}

}  // namespace ds_compress::linear
