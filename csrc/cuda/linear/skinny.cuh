// What the products with few rows of x share: a stream of weights that never dries up.
//
// As many blocks as fit run until all features are done. Every warp has a ring of stages in shared memory; the copies
// of its next tile of features start while the sums of this one are still finished, and those of the first tile before
// x is quantized. So enough bytes are on their way whatever the compiler does with registers. A warp waits for its own
// copies alone.
#pragma once

#include "ds_compress/device.h"
#include "epilogue.cuh"
#include "quantize.cuh"
#include "tokens.cuh"

namespace ds_compress::linear {

constexpr int skinny_warps = 8;
constexpr int skinny_threads = skinny_warps * 32;
static_assert(skinny_threads == quantize_threads);  // such a block may quantize x itself

/// Sums or parts of (token, feature), where a warp writes 8 features of 4 pairs of tokens at once: in different banks.
__host__ __device__ constexpr int skinny_pitch(int features) { return features + 4; }

/// Where a warp is in its part of the block's tiles: `steps` per tile, tiles `stride` features apart.
struct Cursor {
    int64_t first;  // feature of the tile
    int step;

    DSC_DEVICE void advance(int steps, int64_t stride) {
        if (++step < steps) return;
        step = 0;
        first += stride;
    }
};

/// The ring of a warp. `start(stage)` starts the copies of the step that its cursor names, or none at the end.
template <int stages>
struct WarpRing {
    int reading = 0, writing = stages - 1;

    template <class Start>
    DSC_DEVICE void fill(Start& start) {
#pragma unroll 1
        for (int stage = 0; stage < stages - 1; stage++) {
            start(stage);
            commit_copies();
        }
    }

    /// The stage of the next step, whose copies have all come. The stage before it is filled anew: no lane reads it any
    /// more.
    template <class Start>
    DSC_DEVICE int next(Start& start) {
        wait_copies<stages - 2>();
        __syncwarp();
        start(writing);
        commit_copies();
        const int stage = reading;
        reading = reading + 1 == stages ? 0 : reading + 1;
        writing = writing + 1 == stages ? 0 : writing + 1;
        return stage;
    }
};

/// Blocks for n features: as many as fit at once, `resident` to a multiprocessor.
inline dim3 skinny_grid(int64_t n, int features, int resident) {
    const int64_t tiles = (n + features - 1) / features, most = static_cast<int64_t>(resident) * multiprocessors();
    return dim3(static_cast<unsigned>(tiles < most ? tiles : most));
}

}  // namespace ds_compress::linear
