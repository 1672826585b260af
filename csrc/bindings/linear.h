// The integer linear layers, once for all devices: arguments are checked and results allocated here, a `Device`
// multiplies.
//
// A `Device` is a class of static functions: int8_pack, int8_quantize_pack and int4_pack make a packed weight;
// int8_weight and int4_weight check one and tell its shape; int8_linear and int4_linear fill the result of a call.
#pragma once

#include "ds_compress/packed.h"
#include "tensors.h"

namespace ds_compress::bindings {

struct WeightShape {
    int64_t rows, columns;               // outputs, inputs
    int64_t groups = 0, group_size = 0;  // int4: scales of a row, columns that share one
};

/// A call whose arguments were checked.
struct LinearCall {
    const Tensor &x, &packed, &y;  // contiguous
    int64_t rows;                  // of x and y
    WeightShape weight;
    const float *weight_scale, *bias, *input_scale;  // or null
    int steps, activation;                           // activation: as enumerated by both devices
};

inline bool is_vector(const Tensor& tensor, int64_t length) {
    return tensor.scalar_type() == kFp32 && tensor.dim() == 1 && tensor.size(0) == length && tensor.is_contiguous();
}

inline void require_float(ScalarType type, const char* name) {
    require(type == kFp32 || type == kBf16 || type == kFp16, name, " is fp32, bf16 or fp16, got ", name_of(type));
}

inline void require_steps(int64_t steps) { require(steps == 127 || steps == 128, "steps are 127 or 128, got ", steps); }

inline void require_quantized(const Tensor& weight) {
    require(weight.scalar_type() == ScalarType::Char && weight.dim() == 2,
            "a quantized weight is int8 (out_features, in_features), got ", described(weight));
}

inline void require_groups(int64_t group_size, const WeightShape& weight) {
    require(group_size >= 32 && group_size % 32 == 0 && (weight.columns + group_size - 1) / group_size == weight.groups,
            "group_size is a multiple of 32 that makes ", weight.groups, " groups of ", weight.columns,
            " columns, got ", group_size);
}

inline void require_sums_fit(const WeightShape& weight, int64_t steps) {
    const int64_t most = INT32_MAX / (128 * steps);
    require(weight.columns <= most, weight.columns, " columns may overflow an int32 sum: at most ", most, " with ",
            steps, " steps");
}

inline int activation_of(const std::string& name) {
    const char* names[] = {"none", "relu", "gelu_erf", "gelu_tanh", "silu"};
    for (int i = 0; i < 5; i++)
        if (name == names[i]) return i;
    throw std::invalid_argument("activation is one of none, relu, gelu_erf, gelu_tanh, silu, got '" + name + "'");
}

/// What every linear layer asks of x, bias and the dtype of its result.
inline void require_layer(const Tensor& x, int64_t in_features, int64_t out_features, const std::optional<Tensor>& bias,
                          std::optional<ScalarType> out_dtype) {
    require_float(x.scalar_type(), "x");
    require(x.dim() > 0 && x.size(x.dim() - 1) == in_features, "x is (..., ", in_features, "), got ", shape_of(x));
    require(!bias || is_vector(*bias, out_features), "bias is contiguous float32 (", out_features, ",), got ",
            bias ? described(*bias) : "");
    if (out_dtype) require_float(*out_dtype, "out_dtype");
}

/// Contiguous x, as rows, and the new result of a layer.
struct Rows {
    Tensor x, y;
    int64_t count = 1;

    Rows(const Tensor& given, int64_t out_features, std::optional<ScalarType> out_dtype)
        : x(as_contiguous(given)), y(new_tensor(x, shape_with(out_features), out_dtype.value_or(x.scalar_type()))) {
        for (int64_t i = 0; i + 1 < x.dim(); i++) count *= x.size(i);
    }

private:
    std::vector<int64_t> shape_with(int64_t out_features) const {
        std::vector<int64_t> shape;
        for (int64_t i = 0; i + 1 < x.dim(); i++) shape.push_back(x.size(i));
        shape.push_back(out_features);
        return shape;
    }
};

template <class Device>
struct Linear {
    static Tensor int8_linear_pack(const Tensor& quantized) {
        require_quantized(quantized);
        return Device::int8_pack(as_contiguous(quantized));
    }

    static Tensor int8_linear_quantize_pack(const Tensor& weight, const Tensor& scale, int64_t steps) {
        require(weight.dim() == 2, "weight is (out_features, in_features), got ", described(weight));
        require_float(weight.scalar_type(), "weight");
        require(is_vector(scale, weight.size(0)) || is_vector(scale, 1), "scale is contiguous float32 (",
                weight.size(0), ",) or (1,), got ", described(scale));
        require_steps(steps);
        return Device::int8_quantize_pack(as_contiguous(weight), scale, static_cast<int>(steps));
    }

    static Tensor int4_linear_pack(const Tensor& quantized, const Tensor& scale) {
        require_quantized(quantized);
        require(scale.scalar_type() == kFp32 && scale.dim() == 2 && scale.size(0) == quantized.size(0),
                "scale is float32 (", quantized.size(0), ", groups), got ", described(scale));
        return Device::int4_pack(as_contiguous(quantized), as_contiguous(scale));
    }

    static Tensor int8_linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                              std::optional<Tensor> bias, std::optional<Tensor> input_scale, int64_t steps,
                              std::string activation, std::optional<ScalarType> out_dtype) {
        const WeightShape weight = Device::int8_weight(x, packed, weight_scale);
        require(is_vector(weight_scale, weight.rows), "weight_scale is contiguous float32 (", weight.rows, ",), got ",
                described(weight_scale));
        return run(x, packed, weight, &weight_scale, bias, input_scale, steps, activation, out_dtype,
                   Device::int8_linear);
    }

    static Tensor int4_linear(const Tensor& x, const Tensor& packed, int64_t out_features, int64_t group_size,
                              std::optional<Tensor> bias, std::optional<Tensor> input_scale, int64_t steps,
                              std::string activation, std::optional<ScalarType> out_dtype) {
        const WeightShape weight = Device::int4_weight(x, packed, out_features, group_size);
        return run(x, packed, weight, nullptr, bias, input_scale, steps, activation, out_dtype, Device::int4_linear);
    }

    template <class Library>
    static void register_in(Library& m) {
        m.impl("int8_linear_pack", TORCH_BOX(&int8_linear_pack));
        m.impl("int8_linear_quantize_pack", TORCH_BOX(&int8_linear_quantize_pack));
        m.impl("int8_linear", TORCH_BOX(&int8_linear));
        m.impl("int4_linear_pack", TORCH_BOX(&int4_linear_pack));
        m.impl("int4_linear", TORCH_BOX(&int4_linear));
    }

protected:
    template <class Multiply>
    static Tensor run(const Tensor& given, const Tensor& packed, const WeightShape& weight, const Tensor* weight_scale,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& input_scale, int64_t steps,
                      const std::string& activation, std::optional<ScalarType> out_dtype, const Multiply& multiply) {
        require_layer(given, weight.columns, weight.rows, bias, out_dtype);
        require(!input_scale || is_vector(*input_scale, 1), "input_scale is float32 (1,), got ",
                input_scale ? described(*input_scale) : "");
        require_steps(steps);
        require_sums_fit(weight, steps);
        const int activation_number = activation_of(activation);
        const Rows rows(given, weight.rows, out_dtype);
        multiply(LinearCall{rows.x, packed, rows.y, rows.count, weight,
                            weight_scale ? const_data<float>(*weight_scale) : nullptr, const_data_or_null<float>(bias),
                            const_data_or_null<float>(input_scale), static_cast<int>(steps), activation_number});
        return rows.y;
    }
};

}  // namespace ds_compress::bindings
