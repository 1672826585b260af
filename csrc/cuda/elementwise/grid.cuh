// How elementwise kernels share out their work.
#pragma once

#include "ds_compress/device.h"

namespace ds_compress::elementwise {

constexpr int threads = 256;
constexpr int warps = threads / 32;

/// Blocks for `items` threads' worth of work; kernels stride over what is beyond.
inline dim3 blocks_for(int64_t items, int per_block = threads) {
    constexpr int64_t most = 132 * 16;
    const int64_t blocks = (items + per_block - 1) / per_block;
    return dim3(static_cast<unsigned>(blocks < most ? blocks : most));
}

DSC_DEVICE int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
DSC_DEVICE int64_t stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

DSC_DEVICE int64_t first_warp() { return static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32; }
DSC_DEVICE int64_t warp_stride() { return static_cast<int64_t>(gridDim.x) * warps; }

/// 16 bytes at once.
template <class T>
struct alignas(16) Vector {
    static constexpr int count = 16 / sizeof(T);
    T values[count];
};

}  // namespace ds_compress::elementwise
