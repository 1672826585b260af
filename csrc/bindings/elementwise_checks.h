// Argument checks of the elementwise ops, for every device. A failed one becomes a ValueError in Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ds_compress/math.h"

namespace ds_compress::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
    std::ostringstream text;
    text << "(";
    for (int64_t i = 0; i < tensor.dim(); i++) text << (i ? ", " : "") << tensor.size(i);
    text << (tensor.dim() == 1 ? ",)" : ")");
    return text.str();
}

inline const char* name_of(ScalarType type) {
    switch (type) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Half:
            return "float16";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Byte:
            return "uint8";
        case ScalarType::Bool:
            return "bool";
        default:
            return "another dtype";
    }
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

// --- masks ----------------------------------------------------------------------------------------------------------

inline void check_bits(const char* op, const Tensor& packed, int64_t count, int64_t bit_offset) {
    check(op, "packed", packed, 1, {ScalarType::Byte});
    require(count >= 0 && bit_offset >= 0, op, ": a count of ", count, " or a bit_offset of ", bit_offset,
            " is negative");
    require(count <= 8 * packed.numel() - bit_offset, op, ": bits ", bit_offset, " to ", bit_offset + count,
            " of a mask of ", packed.numel(), " bytes");
}

inline void check_governed(const char* op, const char* name, const Tensor& weights, const Tensor& packed,
                           int64_t bit_offset) {
    check(op, name, weights, 1, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
    check_same_device(op, "packed", packed, weights);
    check_bits(op, packed, weights.numel(), bit_offset);
}

inline void check_adam(const Tensor& weights, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& packed,
                       int64_t bit_offset) {
    const char* names[] = {"weights", "exp_avg", "exp_avg_sq"};
    const Tensor* parts[] = {&weights, &exp_avg, &exp_avg_sq};
    for (int i = 0; i < 3; i++) {
        check_governed("mask_apply_adam_", names[i], *parts[i], packed, bit_offset);
        require(parts[i]->numel() == weights.numel(), "mask_apply_adam_: ", names[i], " has ", parts[i]->numel(),
                " elements, weights ", weights.numel());
    }
}

inline void check_many(const std::vector<Tensor>& weights, const std::vector<Tensor>& packed,
                       const std::vector<int64_t>& bit_offsets) {
    const char* op = "mask_apply_many_";
    require(weights.size() == packed.size() && weights.size() == bit_offsets.size(), op, ": ", weights.size(),
            " weights, ", packed.size(), " masks and ", bit_offsets.size(), " bit_offsets");
    for (size_t i = 0; i < weights.size(); i++) {
        check_governed(op, "weights", weights[i], packed[i], bit_offsets[i]);
        check_same_device(op, "weights", weights[i], weights[0]);
    }
}

inline void check_n_of_m(const Tensor& scores, int64_t n, int64_t m) {
    check("mask_n_of_m", "scores", scores, 2, {ScalarType::Float});
    require(0 <= n && n <= m && m >= 1 && m <= INT32_MAX, "mask_n_of_m: 0 <= n <= m and m >= 1 are needed, got n = ",
            n, ", m = ", m);
}

inline void check_histogram(const Tensor& values, int64_t shift, int64_t bins, int64_t prefix_shift) {
    const char* op = "magnitude_histogram";
    check(op, "values", values, 1, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
    require(0 <= shift && shift <= 31 && 0 <= prefix_shift && prefix_shift <= 31, op, ": shifts are 0 to 31, got ",
            shift, " and ", prefix_shift);
    require(1 <= bins && bins <= 65536 && (bins & (bins - 1)) == 0, op,
            ": bins is a power of two up to 65536, got ", bins);
}

// The bits of `fill` in the dtype of the weights.
inline uint64_t pattern_of(double fill, ScalarType type) {
    const auto narrow = static_cast<float>(fill);
    switch (type) {
        case ScalarType::BFloat16:
            return math::bf16_of_float(narrow);
        case ScalarType::Half:
            return math::fp16_of_float(narrow);
        case ScalarType::Double: {
            uint64_t bits;
            memcpy(&bits, &fill, sizeof bits);
            return bits;
        }
        default:
            return math::bits_of(narrow);
    }
}

// --- fake quantization ----------------------------------------------------------------------------------------------

inline void check_fake_quantize(const Tensor& x, const std::optional<Tensor>& scale,
                                const std::optional<Tensor>& offset, int64_t low, int64_t high, int64_t steps,
                                bool symmetric) {
    const std::string op = "fake_quantize: ";
    const ScalarType type = x.scalar_type();
    require(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
            "x is float32, bfloat16 or float16, got ", name_of(type));
    require(x.dim() == 2 && x.is_contiguous(), op, "x is a contiguous matrix (R, C), got ", shape_of(x));
    require(-128 <= low && low <= high && high <= 255 && steps >= 1, op,
            "-128 <= low <= high <= 255 and steps >= 1, got ", low, ", ", high, ", ", steps);
    const char* names[] = {"scale", "offset"};
    const std::optional<Tensor>* given[] = {&scale, &offset};
    for (int i = 0; i < 2; i++) {
        if (!given[i]->has_value()) continue;
        const Tensor& values = **given[i];
        require(values.scalar_type() == ScalarType::Float && values.is_contiguous() && values.device() == x.device(),
                op, names[i], " is contiguous float32 on the device of x");
        require(values.dim() == 1 && (values.numel() == 1 || values.numel() == x.size(0)), op, names[i], " is (",
                x.size(0), ",) or (1,), got ", shape_of(values));
    }
    require(!offset || (!symmetric && scale), op, "an offset belongs to a given scale of an asymmetric grid");
    require(!scale || offset || symmetric, op, "an asymmetric grid with a given scale needs its offset");
    require(!scale || !offset || scale->numel() == offset->numel(), op, "scale and offset have the same length");
}

// --- messages of a reduction ----------------------------------------------------------------------------------------

inline int64_t blocks_of(int64_t numel, int64_t block) { return (numel + block - 1) / block; }

inline int64_t message_bytes(int64_t numel, int64_t bits, int64_t block) {
    return blocks_of(numel, block) * (4 + block * bits / 8);
}

inline void check_format(const char* op, int64_t bits, int64_t block) {
    require(bits == 8 || bits == 4, op, ": bits is 8 or 4, got ", bits);
    require(block % 32 == 0 && 32 <= block && block <= 8192, op, ": block is a multiple of 32 up to 8192, got ",
            block);
}

inline void check_messages(const char* op, const Tensor& messages, int64_t numel, int64_t chunk, int64_t bits,
                           int64_t block) {
    check(op, "messages", messages, 2, {ScalarType::Byte});
    const int64_t bytes = message_bytes(chunk < 0 ? 0 : chunk, bits, block);
    require(chunk >= 0 && messages.size(1) == bytes, op, ": a message of ", chunk, " elements has ", bytes,
            " bytes, got rows of ", messages.size(1));
    require(messages.size(0) * chunk >= numel, op, ": ", messages.size(0), " messages of ", chunk,
            " elements do not hold ", numel);
}

inline void check_summands(const char* op, const Tensor& messages, int64_t numel, int64_t bits, int64_t block) {
    require(messages.dim() != 2 || messages.size(0) >= 1, op, ": there is no message to add up");
    check_messages(op, messages, 0, numel, bits, block);
}

inline void check_residual(const char* op, const std::optional<Tensor>& residual, int64_t numel, const Tensor& like) {
    if (!residual) return;
    check(op, "residual", *residual, 1, {ScalarType::Float});
    check_same_device(op, "residual", *residual, like);
    require(residual->numel() == numel, op, ": residual has ", residual->numel(), " elements for ", numel, " values");
}

}  // namespace ds_compress::bindings
