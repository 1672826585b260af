// The integer linear layers of many experts, once for all devices, as linear.h has those of one: arguments are checked
// and results allocated here, a `Device` multiplies.
//
// A `Device` is a class of static functions: int8_experts and int4_experts check the packed weights and tell the shape
// of each; int8_grouped_linear and int4_grouped_linear fill the result of a call.
#pragma once

#include "linear.h"

namespace ds_compress::bindings {

/// A call whose arguments were checked. Expert e has the rows from offsets[e - 1] (0 for the first) to offsets[e].
struct GroupedCall {
    const Tensor &x, &packed, &offsets, &y;  // contiguous; packed: (experts, bytes); offsets: int32 or int64
    int64_t rows, experts;                   // rows: of x and y
    WeightShape weight;                      // of each expert
    const float *weight_scale, *bias;        // (experts, N), or null
    const float* input_scale;                // (experts,), or null
    int steps;
};

template <class Device>
struct GroupedLinear {
    static Tensor int8_grouped_linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                                      const Tensor& offsets, std::optional<Tensor> bias,
                                      std::optional<Tensor> input_scale, int64_t steps,
                                      std::optional<ScalarType> out_dtype) {
        require_experts(x, packed, offsets);
        require(weight_scale.dim() == 2, "weight_scale is contiguous float32 (", packed.size(0),
                ", out_features), got ", described(weight_scale));
        const WeightShape weight = Device::int8_experts(x, packed, weight_scale);
        require_expert_rows(weight_scale, "weight_scale", packed.size(0), weight.rows);
        return run(x, packed, weight, &weight_scale, offsets, bias, input_scale, steps, out_dtype,
                   Device::int8_grouped_linear);
    }

    static Tensor int4_grouped_linear(const Tensor& x, const Tensor& packed, int64_t out_features, int64_t group_size,
                                      const Tensor& offsets, std::optional<Tensor> bias,
                                      std::optional<Tensor> input_scale, int64_t steps,
                                      std::optional<ScalarType> out_dtype) {
        require_experts(x, packed, offsets);
        const WeightShape weight = Device::int4_experts(x, packed, out_features, group_size);
        return run(x, packed, weight, nullptr, offsets, bias, input_scale, steps, out_dtype,
                   Device::int4_grouped_linear);
    }

    template <class Library>
    static void register_in(Library& m) {
        m.impl("int8_grouped_linear", TORCH_BOX(&int8_grouped_linear));
        m.impl("int4_grouped_linear", TORCH_BOX(&int4_grouped_linear));
    }

private:
    static void require_experts(const Tensor& x, const Tensor& packed, const Tensor& offsets) {
        require(packed.scalar_type() == kByte && packed.dim() == 2 && packed.size(0) > 0 && packed.is_contiguous(),
                "packed weights of experts are contiguous uint8 (experts, bytes), got ", described(packed));
        require_float(x.scalar_type(), "x");
        require(x.dim() == 2, "x is (rows, in_features), got ", shape_of(x));
        const ScalarType type = offsets.scalar_type();
        require((type == ScalarType::Int || type == ScalarType::Long) && offsets.dim() == 1 &&
                    offsets.size(0) == packed.size(0),
                "offsets are int32 or int64 (", packed.size(0), ",), got ", described(offsets));
        require(x.device() == packed.device() && x.device() == offsets.device(),
                "x, packed and offsets are on the same device");
    }

    static void require_expert_rows(const Tensor& tensor, const char* name, int64_t experts, int64_t rows) {
        require(tensor.scalar_type() == kFp32 && tensor.dim() == 2 && tensor.size(0) == experts &&
                    tensor.size(1) == rows && tensor.is_contiguous(),
                name, " is contiguous float32 (", experts, ", ", rows, "), got ", described(tensor));
    }

    template <class Multiply>
    static Tensor run(const Tensor& given, const Tensor& packed, const WeightShape& weight, const Tensor* weight_scale,
                      const Tensor& given_offsets, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& input_scale, int64_t steps, std::optional<ScalarType> out_dtype,
                      const Multiply& multiply) {
        const int64_t rows = given.size(0), experts = packed.size(0);
        require(given.size(1) == weight.columns, "x is (rows, ", weight.columns, "), got ", shape_of(given));
        if (bias) require_expert_rows(*bias, "bias", experts, weight.rows);
        require(!input_scale || is_vector(*input_scale, experts), "input_scale is float32 (", experts, ",), got ",
                input_scale ? described(*input_scale) : "");
        require_steps(steps);
        if (out_dtype) require_float(*out_dtype, "out_dtype");
        require_sums_fit(weight, steps);
        const Tensor x = as_contiguous(given), offsets = as_contiguous(given_offsets);
        const Tensor y = new_tensor(x, {rows, weight.rows}, out_dtype.value_or(x.scalar_type()));
        multiply(GroupedCall{x, packed, offsets, y, rows, experts, weight,
                             weight_scale ? const_data<float>(*weight_scale) : nullptr, const_data_or_null<float>(bias),
                             const_data_or_null<float>(input_scale), static_cast<int>(steps)});
        return y;
    }
};

}  // namespace ds_compress::bindings
