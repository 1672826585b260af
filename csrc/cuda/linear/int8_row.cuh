// int8 linear for a single row of x: a warp takes one feature at a time, whole rows of weights in runs of 512 bytes,
// which memory likes better than the 16 rows at once of int8_skinny.cuh. The block has quantized x, so this is all of
// the layer.
#pragma once

#include "epilogue.cuh"
#include "packed.cuh"
#include "skinny.cuh"
#include "tokens.cuh"

namespace ds_compress::linear {

// Few blocks, since each of them quantizes x, and deep rings: 98 KB are on their way to a multiprocessor.
constexpr int row_stages = 13, row_blocks = 2;
constexpr int row_step = 512;  // bytes of a row that a warp copies at once, 16 a lane
constexpr int row_ring_bytes = skinny_warps * row_stages * row_step;

/// sum + the products of two int4 vectors of sixteen quantized values.
DSC_DEVICE int dot_16(int4 a, int4 b, int sum) {
    return __dp4a(a.w, b.w, __dp4a(a.z, b.z, __dp4a(a.y, b.y, __dp4a(a.x, b.x, sum))));
}

/// What a warp copies: the rows of weights of its features, one after the other.
struct RowStream {
    const int8_t* weights;
    int8_t* ring;  // of this lane
    int64_t pitch, features, stride;
    int steps, place;  // place: of the lane within a step
    Cursor cursor;

    DSC_DEVICE void operator()(int stage) {
        if (cursor.first >= features || steps == 0) return;
        const int64_t byte = static_cast<int64_t>(cursor.step) * row_step + place;
        const bool exists = byte < pitch;
        copy_async_16(ring + stage * row_step, weights + cursor.first * pitch + (exists ? byte : 0), exists);
        cursor.advance(steps, stride);
    }
};

DSC_DEVICE RowStream row_stream(const int8_t* weights, int8_t* shared, int64_t pitch, int64_t features) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return {weights,
            shared + warp * row_stages * row_step + lane * 16,
            pitch,
            features,
            static_cast<int64_t>(gridDim.x) * skinny_warps,
            static_cast<int>((pitch + row_step - 1) / row_step),
            lane * 16,
            {static_cast<int64_t>(blockIdx.x) * skinny_warps + warp, 0}};
}

/// Grid: any number of blocks; their warps share out the features. Dynamic shared memory: the rings, then the quantized
/// values of x.
template <class Given>
__global__ void __launch_bounds__(skinny_threads, row_blocks)
    int8_row_kernel(Given given, const void* __restrict__ packed, int64_t k, Epilogue e) {
    DSC_DYNAMIC_SHARED(int8_t, shared);
    const int lane = threadIdx.x % 32;
    int8_t* const own = shared + row_ring_bytes;
    const auto early = given.begin(1, k, own);
    RowStream stream = row_stream(packed_body(packed), shared, int8_row_bytes(k), e.n);
    WarpRing<row_stages> copies;
    copies.fill(stream);
    const Tokens x = given.template end<row_stages - 1>(early, 1, k, own);

    int64_t first = static_cast<int64_t>(blockIdx.x) * skinny_warps + threadIdx.x / 32;
    while (first < e.n) {  // 32 features a turn, one of which every lane finishes
        int mine = 0, done = 0;
        for (; done < 32 && first + done * stream.stride < e.n; done++) {
            int sum = 0;
#pragma unroll 1
            for (int step = 0; step < stream.steps; step++) {
                const int4 weight = *reinterpret_cast<const int4*>(stream.ring + copies.next(stream) * row_step);
                const int byte =
                    step * row_step + lane * 16;  // beyond the end the weights are 0, and the quantized values anything
                sum =
                    dot_16(*reinterpret_cast<const int4*>(x.quantized + (byte < stream.pitch ? byte : 0)), weight, sum);
            }
            sum = __reduce_add_sync(~0u, sum);
            if (lane == done) mine = sum;
        }
        if (lane < done) {
            const int64_t column = first + lane * stream.stride;
            const float value[1] = {finish(e, static_cast<float>(mine), x.scales[0], column)};
            store(e, column, value, 1);
        }
        first += 32 * stream.stride;
    }
}

}  // namespace ds_compress::linear
