// int8 linear for one to eight rows of x (decoding): the weights are read once, at the speed of memory, by one warp
// per output feature. Integer sums are exact, so the order in which lanes add does not matter.
#pragma once

#include "epilogue.cuh"
#include "packed.cuh"

namespace ds_compress::linear {

constexpr int gemv_warps = 8;  // output features per block
constexpr int most_gemv_rows = 8;

/// sum + the four products of two int4 vectors of four codes each.
DSC_DEVICE int dot_16(int4 a, int4 b, int sum) {
    return __dp4a(a.w, b.w, __dp4a(a.z, b.z, __dp4a(a.y, b.y, __dp4a(a.x, b.x, sum))));
}

/// Lane r finishes row r: `sums` holds every row's sum in every lane.
template <int rows>
DSC_DEVICE void finish_column(const Epilogue& e, const float (&sums)[rows], int64_t column) {
    const int lane = threadIdx.x % 32;
    if (lane >= e.m) return;
    float mine = 0.0f;
#pragma unroll
    for (int r = 0; r < rows; r++) mine = lane == r ? sums[r] : mine;
    const float value[1] = {finish(e, mine, e.input_scale[lane], column)};
    store(e, lane * e.n + column, value, 1);
}

/// e.m <= rows. Grid: n / gemv_warps.
template <int rows>
__global__ void __launch_bounds__(gemv_warps * 32)
    int8_gemv_kernel(const int8_t* __restrict__ codes, const void* __restrict__ packed, int64_t k, Epilogue e) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * gemv_warps + threadIdx.x / 32;
    if (column >= e.n) return;
    const int64_t pitch = int8_row_bytes(k);
    const int8_t* const weights = packed_body(packed) + column * pitch;

    int sums[rows] = {};
#pragma unroll 2
    for (int64_t byte = threadIdx.x % 32 * 16; byte < pitch; byte += 32 * 16) {
        const int4 weight = *reinterpret_cast<const int4*>(weights + byte);
#pragma unroll
        for (int r = 0; r < rows; r++) {
            if (r < e.m) sums[r] = dot_16(*reinterpret_cast<const int4*>(codes + r * pitch + byte), weight, sums[r]);
        }
    }
    float totals[rows];
#pragma unroll
    for (int r = 0; r < rows; r++) totals[r] = static_cast<float>(__reduce_add_sync(~0u, sums[r]));
    finish_column(e, totals, column);
}

}  // namespace ds_compress::linear
