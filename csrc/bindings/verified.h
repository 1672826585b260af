// Whether a way of multiplying gives the right sums on this device, found out at its first use there.
//
// Kernels that were never run on a kind of GPU (by us, or made of PTX by a later driver) are not trusted blindly: one
// small product of integers, in which any mistake shows, is compared with the same sums from the CPU. A way that fails
// is said once, on stderr, and not taken again.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include "../cuda/hopper/launchers.h"

namespace ds_compress::bindings {

struct Way {
    int tile;  // one of dsc_hopper_tiles, or one of those below

    // mma.sync, which every GPU since sm_80 has: tiles, what up to 32 rows take, and tiles of many experts.
    static constexpr int any_gpu = -1, few_rows = -2, grouped = -3;

    bool is_hopper() const { return tile >= 0; }
    int index() const { return tile - grouped; }
    const char* name() const {
        if (is_hopper()) return "the int8 kernels of Hopper (wgmma)";
        if (tile == grouped) return "the int8 kernels for experts (mma.sync)";
        return tile == few_rows ? "the int8 kernels for few rows (mma.sync)" : "the int8 kernels (mma.sync)";
    }
};

enum class Verdict : int { unknown = 0, right, wrong };

/// Of `way` on the device of `like`, which is the current one. Unknown only while `stream` is being captured and the
/// way was not tried before: trying waits for the device.
Verdict verify(const Way& way, const torch::stable::Tensor& like, cudaStream_t stream);

}  // namespace ds_compress::bindings
