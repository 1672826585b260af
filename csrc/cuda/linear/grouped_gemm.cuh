// The products of int8_gemm.cuh and int4_gemm.cuh for all experts of a mixture in one launch: a block finds its expert,
// and computes a tile of that expert's rows with its weights.
#pragma once

#include "experts.cuh"
#include "int4_gemm.cuh"
#include "int8_gemm.cuh"
#include "quantize.cuh"

namespace ds_compress::linear {

/// The packed weights of the experts, and how far they lie apart.
struct ExpertWeights {
    const int8_t* packed;
    int64_t bytes;

    DSC_DEVICE const void* of(int expert) const { return packed + expert * bytes; }
};

/// `e` for the rows of one expert: there is no activation, which the compiler then leaves out.
DSC_DEVICE Epilogue epilogue_of(const Epilogue& e, const ExpertRows& rows) {
    Epilogue own = e;
    own.m = rows.end;
    own.activation = dsc_none;
    if (e.weight_scale != nullptr) own.weight_scale += rows.expert * e.n;
    if (e.bias != nullptr) own.bias += rows.expert * e.n;
    return own;
}

/// Zeros for a tile of rows that belong to no expert.
template <int tile_m, int tile_n, int threads>
DSC_DEVICE void clear_tile(const Epilogue& e, const ExpertRows& rows, int64_t first_n) {
    const int64_t left = rows.end - rows.first, width = e.n - first_n < tile_n ? e.n - first_n : tile_n;
    const float zero[1] = {0.0f};
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < (left < tile_m ? left : tile_m) * tile_n; i += threads) {
        if (i % tile_n < width) store(e, (rows.first + i / tile_n) * e.n + first_n + i % tile_n, zero, 1);
    }
}

/// Grid: (places_of<Tile::tile_m>, tiles of n).
template <class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    int8_grouped_kernel(const int8_t* __restrict__ quantized, ExpertWeights weights, int64_t k, Experts experts,
                        Epilogue e) {
    const ExpertRows rows = rows_at<Tile::tile_m>(experts, blockIdx.x);
    const int64_t first_n = static_cast<int64_t>(blockIdx.y) * Tile::tile_n;
    if (rows.first >= rows.end) return;  // whole blocks
    if (rows.expert == experts.count) return clear_tile<Tile::tile_m, Tile::tile_n, Tile::threads>(e, rows, first_n);
    int8_gemm_block<Tile>(quantized, weights.of(rows.expert), k, epilogue_of(e, rows), rows.first, first_n);
}

/// The same; group: 32, 64 or 128.
template <class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    int4_grouped_kernel(const int8_t* __restrict__ quantized, ExpertWeights weights, int64_t k, int group,
                        Experts experts, Epilogue e) {
    const ExpertRows rows = rows_at<Tile::tile_m>(experts, blockIdx.x);
    const int64_t first_n = static_cast<int64_t>(blockIdx.y) * Tile::tile_n;
    if (rows.first >= rows.end) return;
    if (rows.expert == experts.count) return clear_tile<Tile::tile_m, Tile::tile_n, Tile::threads>(e, rows, first_n);
    int4_gemm_block<Tile>(quantized, weights.of(rows.expert), k, group, epilogue_of(e, rows), rows.first, first_n);
}

/// quantize_rows_kernel with a given scale for each expert. A row of no expert takes that of the last one.
template <class T, int threads_per_row>
__global__ void __launch_bounds__(quantize_threads)
    quantize_expert_rows_kernel(const T* __restrict__ x, const float* __restrict__ given_scales, Experts experts,
                                int64_t columns, int64_t padded_columns, int steps, int8_t* __restrict__ quantized,
                                float* __restrict__ scales) {
    constexpr int rows_per_block = quantize_threads / threads_per_row;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
    if (index >= experts.rows) return;  // whole warps
    const Row<T> row(x + index * columns, x, columns);
    const HeldChunks<T, threads_per_row, 2> early(row);
    const int expert = rows_at<1>(experts, index).expert;
    quantize_row(row, early, given_scales + (expert < experts.count ? expert : experts.count - 1), steps,
                 padded_columns, quantized + index * padded_columns, scales + index);
}

}  // namespace ds_compress::linear
