// The products of Hopper, as tiles. Each instance is a file of its own, since CUTLASS compiles for half a minute.
//
// "Ping-pong": two groups of warps take turns, one multiplies a tile while the other finishes the one before, which
// hides our epilogue; the cooperative schedule, where both share a larger tile, was slower on an H200 for every shape.
#pragma once

#include "product.cuh"
#include "products.h"

namespace ds_compress::hopper {

using cute::_128;
using cute::_2;
using cute::_64;

template <class Out, class Tile, class Cluster>
using Int8Product = Product<int8_t, int32_t, Out, Tile, Cluster, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                            cutlass::epilogue::TmaWarpSpecialized>;

}  // namespace ds_compress::hopper
