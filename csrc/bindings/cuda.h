// What the CUDA bindings share: the device and stream of a call, and its errors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

namespace ds_compress::bindings {
namespace {

// Makes the device of `tensor` the current one; `stream` is torch's current stream there.
class OnDevice {
public:
    explicit OnDevice(const torch::stable::Tensor& tensor)
        : guard_(tensor.get_device_index()),
          stream(static_cast<cudaStream_t>(
              torch::stable::accelerator::getCurrentStream(tensor.get_device_index()).nativeHandle())) {}

private:
    torch::stable::accelerator::DeviceGuard guard_;

public:
    const cudaStream_t stream;
};

inline void check_launch(cudaError_t error, const char* op) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace
}  // namespace ds_compress::bindings
