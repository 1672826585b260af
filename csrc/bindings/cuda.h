// What the CUDA bindings share: the device and stream of a call, and its errors.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

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
        if (!found) throw std::runtime_error("this torch has no aoti_torch_get_current_cuda_stream: is it without CUDA?");
        return reinterpret_cast<Get>(found);
    }();
    void* stream = nullptr;
    if (get(device_index, &stream) != AOTI_TORCH_SUCCESS) throw std::runtime_error("torch gave no current stream");
    return static_cast<cudaStream_t>(stream);
}

// Makes the device of `tensor` the current one; `stream` is torch's current stream there.
class OnDevice {
public:
    explicit OnDevice(const torch::stable::Tensor& tensor)
        : guard_(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}

private:
    torch::stable::accelerator::DeviceGuard guard_;

public:
    const cudaStream_t stream;
};

// A value of every device that is asked for once; threads that meet here write the same.
template <class Ask>
int of_device(int (&known)[64], int device, Ask ask) {
    if (device < 0 || device >= 64) return ask();
    if (known[device] == 0) known[device] = ask();
    return known[device];
}

inline int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess && value > 0 ? value : 1;
}

inline int multiprocessors(int device) {
    static int known[64];
    return of_device(known, device, [&] { return attribute(cudaDevAttrMultiProcessorCount, device); });
}

// 9 on Hopper, for which alone the code of sm_90a is.
inline int major_version(int device) {
    static int known[64];
    return of_device(known, device, [&] { return attribute(cudaDevAttrComputeCapabilityMajor, device); });
}

// Memory of torch's allocator on the device of `like`, by the shortest way that the stable ABI has (a third of the time of
// torch::stable::new_empty, which goes through the dispatcher by the name of the op).
inline torch::stable::Tensor new_tensor(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes,
                                        torch::headeronly::ScalarType type) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
    int32_t device_type = 0;
    AtenTensorHandle made = nullptr;
    if (aoti_torch_get_device_type(like.get(), &device_type) != AOTI_TORCH_SUCCESS ||
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type, like.get_device_index(), &made) !=
            AOTI_TORCH_SUCCESS)
        throw std::runtime_error("torch gave no memory");
    return torch::stable::Tensor(made);
}

inline void check_launch(cudaError_t error, const char* op) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace
}  // namespace ds_compress::bindings
