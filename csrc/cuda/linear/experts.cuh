// Which rows of x belong to which expert, found by every warp for itself from the offsets on the device: nobody waits
// for them on the host, so the grid has room for any of them.
#pragma once

#include "ds_compress/device.h"

namespace ds_compress::linear {

struct Experts {
    const void* offsets;  // where the rows of each end
    int wide;             // int64, else int32
    int count;
    int64_t rows;  // of x

    /// Clamped, so that wrong offsets reach nothing that is not there. Of `count`: the end of x.
    DSC_DEVICE int64_t end(int expert) const {
        if (expert < 0) return 0;
        if (expert >= count) return rows;
        const int64_t given = wide ? static_cast<const int64_t*>(offsets)[expert]
                                   : static_cast<int64_t>(static_cast<const int32_t*>(offsets)[expert]);
        return given < 0 ? 0 : given < rows ? given : rows;
    }
};

/// Rows of one expert, or those behind the last expert's, whose `expert` is Experts::count; none if first == end.
struct ExpertRows {
    int expert;
    int64_t first, end;
};

/// Places for all tiles of `tile` rows: an expert's begin at place begin / tile + expert, so that no two experts share
/// one, whatever the offsets. Where that is more than there are rows, each row has a place, and the first of a tile
/// counts.
template <int tile>
__host__ __device__ constexpr int64_t places_of(int64_t rows, int64_t experts) {
    const int64_t places = rows / tile + experts + 1;
    return rows < places ? rows : places;
}

/// The tile at `place`, by a whole warp.
template <int tile>
DSC_DEVICE ExpertRows rows_at(const Experts& experts, int64_t place) {
    const bool by_row = places_of<tile>(experts.rows, experts.count) == experts.rows;
    const auto place_of = [&](int expert, int64_t begin) { return by_row ? begin : begin / tile + expert; };
    unsigned found = 0;
#pragma unroll 1
    for (int expert = threadIdx.x % 32; expert <= experts.count; expert += 32) {
        const int64_t begin = experts.end(expert - 1), end = experts.end(expert);
        const int64_t mine = place_of(expert, begin), count = by_row ? end - begin : (end - begin + tile - 1) / tile;
        if (place >= mine && place < mine + count) found = expert + 1;
    }
    found = __reduce_max_sync(~0u, found);
    if (found == 0) return {0, 0, 0};
    const int expert = static_cast<int>(found) - 1;
    const int64_t begin = experts.end(expert - 1), end = experts.end(expert), nth = place - place_of(expert, begin);
    if (by_row && nth % tile != 0) return {expert, end, end};
    return {expert, by_row ? place : begin + nth * tile, end};
}

}  // namespace ds_compress::linear
