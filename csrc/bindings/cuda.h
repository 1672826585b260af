// What the CUDA bindings share: the device and stream of a call, its errors, and dtypes as launchers number them.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/launchers.h"
#include "tensors.h"

namespace ds_compress::bindings {
namespace {

// Torch's current stream on a device. The one function for this that torch 2.10 has lies in libtorch_cuda.so, so it is
// looked up in the library that the process has loaded: linked to, it would keep ours from loading on a torch without
// CUDA. (torch::stable's Stream::nativeHandle needs torch 2.13.)
inline cudaStream_t current_stream(int32_t device_index) {
    using Get = decltype(&aoti_torch_get_current_cuda_stream);
    static const Get get = [] {
        void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        void* found = dlsym(torch_cuda ? torch_cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
        if (!found)
            throw std::runtime_error("this torch has no aoti_torch_get_current_cuda_stream: is it without CUDA?");
        return reinterpret_cast<Get>(found);
    }();
    void* stream = nullptr;
    if (get(device_index, &stream) != AOTI_TORCH_SUCCESS) throw std::runtime_error("torch gave no current stream");
    return static_cast<cudaStream_t>(stream);
}

// Makes the device of `tensor` the current one; `stream` is torch's current stream there.
class OnDevice {
public:
    explicit OnDevice(const Tensor& tensor)
        : guard_(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}

private:
    torch::stable::accelerator::DeviceGuard guard_;

public:
    const cudaStream_t stream;
};

inline void check_launch(cudaError_t error, const char* op) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

inline int dtype_of(const Tensor& tensor) {
    const ScalarType type = tensor.scalar_type();
    return type == kBf16 ? dsc_bfloat16 : type == kFp16 ? dsc_float16 : dsc_float32;
}

}  // namespace
}  // namespace ds_compress::bindings
