// Argument checks of the linear ops, for every device. A failed one becomes a ValueError in Python.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ds_compress/packed.h"

namespace ds_compress {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void require(bool holds, const Parts&... message) {
    if (holds) return;
    std::ostringstream text;
    (text << ... << message);
    throw std::invalid_argument(text.str());
}

inline std::string shape_of(const Tensor& tensor) {
    std::ostringstream text;
    text << tensor.scalar_type() << " (";
    for (int64_t i = 0; i < tensor.dim(); i++) text << (i ? ", " : "") << tensor.size(i);
    text << ")";
    return text.str();
}

inline bool is_vector(const Tensor& tensor, int64_t length) {
    return tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.size(0) == length &&
           tensor.is_contiguous();
}

inline void require_float(ScalarType type, const char* name) {
    require(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
            " is fp32, bf16 or fp16, got ", type);
}

inline void require_steps(int64_t steps) { require(steps == 127 || steps == 128, "steps are 127 or 128, got ", steps); }

inline void require_codes(const Tensor& codes) {
    require(codes.scalar_type() == ScalarType::Char && codes.dim() == 2,
            "codes are int8 (out_features, in_features), got ", shape_of(codes));
}

// What int8_linear and int4_linear have in common, once the shape of the weight is known.
inline void require_linear(const Tensor& x, int64_t rows, int64_t columns, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& input_scale, int64_t steps,
                           std::optional<ScalarType> out_dtype) {
    require_float(x.scalar_type(), "x");
    require(x.dim() > 0 && x.size(x.dim() - 1) == columns, "x is (..., ", columns, "), got ", shape_of(x));
    require(!bias || is_vector(*bias, rows), "bias is contiguous Float (", rows, "), got ",
            bias ? shape_of(*bias) : "");
    require(!input_scale || is_vector(*input_scale, 1), "input_scale is Float (1), got ",
            input_scale ? shape_of(*input_scale) : "");
    require_steps(steps);
    if (out_dtype) require_float(*out_dtype, "out_dtype");
    const int64_t most = INT32_MAX / (128 * steps);
    require(columns <= most, columns, " columns may overflow an int32 sum: at most ", most, " with ", steps, " steps");
}

// Checks the head of a packed weight that lies at `header` and has `bytes` bytes.
inline void require_packed(const PackedHeader& header, int64_t bytes, int64_t layout, const char* reader) {
    require(header.magic == kPackedMagic, "this is no packed weight: pack it with int8_linear_pack or its relatives");
    require(header.layout == layout, "this weight was packed for other kernels (layout ", header.layout, "); ", reader,
            " reads layout ", layout, ": pack it again");
    const int64_t expected = packed_bytes(header.rows, header.columns, header.groups > 0 ? 4 : 8, header.groups);
    require(bytes == expected, "a packed weight of (", header.rows, ", ", header.columns, ") has ", expected,
            " bytes, got ", bytes);
}

inline std::vector<int64_t> result_shape(const Tensor& x, int64_t rows) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i + 1 < x.dim(); i++) shape.push_back(x.size(i));
    shape.push_back(rows);
    return shape;
}

}  // namespace
}  // namespace ds_compress
