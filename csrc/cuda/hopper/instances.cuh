// The tiles of the products of Hopper, from few rows to many; each instance is a file of its own, since each compiles for half a
// minute.
#pragma once

#include "product.cuh"
#include "products.h"

namespace ds_compress::hopper {

namespace schedule = cutlass::gemm;
namespace storing = cutlass::epilogue;
using cute::_128;
using cute::_2;
using cute::_256;
using cute::_64;

// "Ping-pong": two groups of warps take turns, one multiplies a tile while the other finishes the one before. "Cooperative": both
// multiply halves of one tile, which then can be larger.
template <class Code>
constexpr bool is_fp8 = !std::is_same_v<Code, int8_t>;
template <class Code>
using PingPong = std::conditional_t<is_fp8<Code>, schedule::KernelTmaWarpSpecializedPingpongFP8FastAccum,
                                    schedule::KernelTmaWarpSpecializedPingpong>;
template <class Code>
using Cooperative = std::conditional_t<is_fp8<Code>, schedule::KernelTmaWarpSpecializedCooperativeFP8FastAccum,
                                       schedule::KernelTmaWarpSpecializedCooperative>;
template <class Code>
using Sum = std::conditional_t<is_fp8<Code>, float, int32_t>;

template <class Code, class Out, class Tile, class Cluster>
using PingPongProduct =
    Product<Code, Sum<Code>, Out, Tile, Cluster, PingPong<Code>, storing::TmaWarpSpecialized>;
template <class Code, class Out, class Tile, class Cluster>
using CooperativeProduct =
    Product<Code, Sum<Code>, Out, Tile, Cluster, Cooperative<Code>, storing::TmaWarpSpecializedCooperative>;

}  // namespace ds_compress::hopper
