// What the products with up to 32 rows of x share: a ring of stages in shared memory for every warp, so that enough bytes are
// on their way whatever the compiler does with registers. A warp waits for its own copies alone; there is no barrier.
#pragma once

#include "ds_compress/device.h"
#include "quantize.cuh"

namespace ds_compress::linear {

constexpr int skinny_warps = 8;
constexpr int skinny_threads = skinny_warps * 32;
static_assert(skinny_threads == quantize_threads);  // such a block may quantize x itself

/// Sums or parts of (token, feature), where a warp writes 8 features of 4 pairs of tokens at once: in different banks.
constexpr int skinny_pitch(int features) { return features + 4; }

/// `start(stage, step)` starts the copies of a step; `use(stage, step)` reads them, after all lanes' have come.
template <int stages>
struct WarpRing {
    int reading = 0, writing = 0, started = 0;

    template <class Start>
    DSC_DEVICE void fill(int steps, Start start) {
        for (; started < stages - 1; started++) {
            if (started < steps) start(started, started);
            commit_copies();
        }
        writing = stages - 1;
    }

    /// Steps [step, end) of `steps`; those behind are started meanwhile.
    template <class Start, class Use>
    DSC_DEVICE void advance(int step, int end, int steps, Start start, Use use) {
        for (; step < end; step++) {
            wait_copies<stages - 2>();
            __syncwarp();  // now the copies of all lanes are there, and no lane still reads the stage before
            if (started < steps) start(writing, started);
            started++;
            commit_copies();
            use(reading, step);
            reading = reading + 1 == stages ? 0 : reading + 1;
            writing = writing + 1 == stages ? 0 : writing + 1;
        }
    }
};

}  // namespace ds_compress::linear
