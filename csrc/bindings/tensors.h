// What all bindings share, whatever the device: checks that become a ValueError in Python, and new tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ds_compress::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr ScalarType kFp32 = ScalarType::Float, kBf16 = ScalarType::BFloat16, kFp16 = ScalarType::Half,
                     kFp64 = ScalarType::Double, kByte = ScalarType::Byte;

template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream text;
    (text << ... << parts);
    throw std::invalid_argument(text.str());
}

inline const char* name_of(ScalarType type) {
    switch (type) {
        case kFp32:
            return "float32";
        case kBf16:
            return "bfloat16";
        case kFp16:
            return "float16";
        case kFp64:
            return "float64";
        case kByte:
            return "uint8";
        case ScalarType::Char:
            return "int8";
        case ScalarType::Bool:
            return "bool";
        default:
            return "another dtype";
    }
}

inline std::string shape_of(const Tensor& tensor) {
    std::ostringstream text;
    text << "(";
    for (int64_t i = 0; i < tensor.dim(); i++) text << (i ? ", " : "") << tensor.size(i);
    text << (tensor.dim() == 1 ? ",)" : ")");
    return text.str();
}

/// "float32 (2, 3)"
inline std::string described(const Tensor& tensor) {
    return std::string(name_of(tensor.scalar_type())) + " " + shape_of(tensor);
}

inline void check(const char* op, const char* name, const Tensor& tensor, int64_t dim,
                  std::initializer_list<ScalarType> types) {
    std::string allowed;
    bool found = false;
    for (ScalarType type : types) {
        found = found || tensor.scalar_type() == type;
        allowed += (allowed.empty() ? "" : ", ") + std::string(name_of(type));
    }
    require(found, op, ": ", name, " is ", allowed, ", got ", name_of(tensor.scalar_type()));
    require(tensor.dim() == dim && tensor.is_contiguous(), op, ": ", name, " is a contiguous tensor of ", dim,
            " dimensions, got ", shape_of(tensor));
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
    require(tensor.device() == like.device(), op, ": ", name, " is on another device than the other arguments");
}

/// Contiguous memory of torch's allocator on the device of `like`, by the shortest way that the stable ABI has (a third
/// of the time of torch::stable::new_empty, which goes through the dispatcher by the name of the op).
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
    int32_t device_type = 0;
    AtenTensorHandle made = nullptr;
    const auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    if (aoti_torch_get_device_type(like.get(), &device_type) != AOTI_TORCH_SUCCESS ||
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), number, device_type,
                                 like.get_device_index(), &made) != AOTI_TORCH_SUCCESS)
        throw std::runtime_error("torch gave no memory");
    return Tensor(made);
}

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

template <class T>
T* data(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
const T* const_data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* data_or_null(const std::optional<Tensor>& tensor) {
    return tensor ? data<T>(*tensor) : nullptr;
}

template <class T>
const T* const_data_or_null(const std::optional<Tensor>& tensor) {
    return tensor ? const_data<T>(*tensor) : nullptr;
}

}  // namespace ds_compress::bindings
