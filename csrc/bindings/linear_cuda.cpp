// Integer linear layers on CUDA: packing, and what products are asked for; how they are made is in products_cuda.h.
//
// The header of a packed weight lies on the device and is not read, which would wait for the GPU: a weight is packed
// on the device that uses it.
#include "products_cuda.h"

#include <torch/csrc/stable/library.h>

namespace ds_compress {
namespace {

using bindings::OnDevice;

int activation_of(const std::string& name) {
    const char* names[] = {"none", "relu", "gelu_erf", "gelu_tanh", "silu"};  // in the order of DscActivation
    for (int i = 0; i < 5; i++)
        if (name == names[i]) return i;
    throw std::invalid_argument("activation is one of none, relu, gelu_erf, gelu_tanh, silu, got '" + name + "'");
}

template <class T>
const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

Tensor new_packed(const Tensor& like, int64_t rows, int64_t columns, int64_t groups) {
    return torch::stable::new_zeros(like, {packed_bytes(rows, columns, groups > 0 ? 4 : 8, groups)}, ScalarType::Byte);
}

// --- packing ------------------------------------------------------------------------------------------------------

Tensor int8_linear_pack(const Tensor& given) {
    require_codes(given);
    const Tensor codes = torch::stable::contiguous(given);
    const OnDevice on(codes);
    Tensor packed = new_packed(codes, codes.size(0), codes.size(1), 0);
    check_launch(dsc_int8_pack(data<int8_t>(codes), codes.size(0), codes.size(1), packed.mutable_data_ptr(), on.stream),
                 "int8_linear_pack");
    return packed;
}

Tensor int8_linear_quantize_pack(const Tensor& given, const Tensor& scale, int64_t steps) {
    require(given.dim() == 2, "weight is (out_features, in_features), got ", shape_of(given));
    require_float(given.scalar_type(), "weight");
    require(is_vector(scale, given.size(0)) || is_vector(scale, 1), "scale is Float (", given.size(0),
            ") or (1), got ", shape_of(scale));
    require_steps(steps);
    const Tensor values = torch::stable::contiguous(given);
    const OnDevice on(values);
    Tensor packed = new_packed(values, values.size(0), values.size(1), 0);
    check_launch(dsc_int8_quantize_pack(values.const_data_ptr(), dtype_of(values.scalar_type()), data<float>(scale),
                                        scale.size(0) != values.size(0), values.size(0), values.size(1),
                                        static_cast<int>(steps), packed.mutable_data_ptr(), on.stream),
                 "int8_linear_quantize_pack");
    return packed;
}

Tensor int4_linear_pack(const Tensor& given, const Tensor& given_scale) {
    require_codes(given);
    require(given_scale.scalar_type() == ScalarType::Float && given_scale.dim() == 2 &&
                given_scale.size(0) == given.size(0),
            "scale is Float (", given.size(0), ", groups), got ", shape_of(given_scale));
    const Tensor codes = torch::stable::contiguous(given), scale = torch::stable::contiguous(given_scale);
    const int64_t columns = codes.size(1), groups = scale.size(1);
    int group = 0;
    for (int candidate : {32, 64, 128})
        if ((columns + candidate - 1) / candidate == groups) group = candidate;
    require(group > 0, "int4 weights on CUDA have groups of 32, 64 or 128 columns; ", groups, " groups of ", columns,
            " columns are none of these");
    const OnDevice on(codes);
    Tensor packed = new_packed(codes, codes.size(0), columns, groups);
    check_launch(dsc_int4_pack(data<int8_t>(codes), data<float>(scale), codes.size(0), columns, group,
                               packed.mutable_data_ptr(), on.stream),
                 "int4_linear_pack");
    return packed;
}

Tensor sparse24_linear_pack(const Tensor& given) {
    require_codes(given);
    require(given.size(1) % 4 == 0, "2:4 weights have a multiple of 4 columns, got ", given.size(1));
    const Tensor codes = torch::stable::contiguous(given);
    const OnDevice on(codes);
    Tensor packed = new_packed(codes, codes.size(0), codes.size(1), 0);
    Tensor invalid = torch::stable::new_zeros(codes, {1}, ScalarType::Int);
    check_launch(dsc_sparse24_pack(data<int8_t>(codes), codes.size(0), codes.size(1), packed.mutable_data_ptr(),
                                   static_cast<int*>(invalid.mutable_data_ptr()), on.stream),
                 "sparse24_linear_pack");
    int count = 0;
    check_launch(cudaMemcpyAsync(&count, invalid.const_data_ptr(), sizeof count, cudaMemcpyDeviceToHost, on.stream),
                 "sparse24_linear_pack");
    check_launch(cudaStreamSynchronize(on.stream), "sparse24_linear_pack");
    require(count == 0, "2:4 weights have at most 2 non-zeros in 4 columns; ", count, " fours have more");
    return packed;
}

// --- multiplying --------------------------------------------------------------------------------------------------

void require_size(const Tensor& packed, int64_t rows, int64_t columns, int64_t groups) {
    const int64_t expected = packed_bytes(rows, columns, groups > 0 ? 4 : 8, groups);
    require(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.size(0) == expected,
            "a packed weight of (", rows, ", ", columns, ") is Byte (", expected, "), got ", shape_of(packed));
}

// int8_linear and sparse24_linear.
template <class Multiply>
Tensor linear(const Tensor& given, const Tensor& packed, const Tensor& weight_scale, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& input_scale, int64_t steps, const std::string& activation,
              std::optional<ScalarType> out_dtype, Multiply multiply) {
    require(given.dim() > 0, "x is (..., in_features), got ", shape_of(given));
    const int64_t columns = given.size(given.dim() - 1), outputs = weight_scale.numel();
    require(is_vector(weight_scale, outputs), "weight_scale is contiguous Float (out_features), got ",
            shape_of(weight_scale));
    require_size(packed, outputs, columns, 0);
    require_linear(given, outputs, columns, bias, input_scale, steps, out_dtype);
    const Tensor x = as_contiguous(given);
    const OnDevice on(x);
    Tensor y = new_tensor(x, result_shape(x, outputs), out_dtype.value_or(x.scalar_type()));
    multiply(Call{x, packed, data<float>(weight_scale), data_or_null(bias), y, shape_of_rows(x), outputs,
                  static_cast<int>(steps), activation_of(activation), on.stream},
             input_scale);
    return y;
}

Tensor int8_linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale, std::optional<Tensor> bias,
                   std::optional<Tensor> input_scale, int64_t steps, std::string activation,
                   std::optional<ScalarType> out_dtype) {
    return linear(x, packed, weight_scale, bias, input_scale, steps, activation, out_dtype, multiply_int8);
}

Tensor sparse24_linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale, std::optional<Tensor> bias,
                       std::optional<Tensor> input_scale, int64_t steps, std::string activation,
                       std::optional<ScalarType> out_dtype) {
    return linear(x, packed, weight_scale, bias, input_scale, steps, activation, out_dtype, multiply_sparse24);
}

Tensor int4_linear(const Tensor& given, const Tensor& packed, int64_t out_features, int64_t group_size,
                   std::optional<Tensor> bias, std::optional<Tensor> input_scale, int64_t steps,
                   std::string activation, std::optional<ScalarType> out_dtype) {
    require(group_size == 32 || group_size == 64 || group_size == 128, "group_size is 32, 64 or 128 on CUDA, got ",
            group_size);
    require(given.dim() > 0, "x is (..., in_features), got ", shape_of(given));
    const int64_t columns = given.size(given.dim() - 1);
    require_size(packed, out_features, columns, (columns + group_size - 1) / group_size);
    require_linear(given, out_features, columns, bias, input_scale, steps, out_dtype);
    const Tensor x = as_contiguous(given);
    const OnDevice on(x);
    Tensor y = new_tensor(x, result_shape(x, out_features), out_dtype.value_or(x.scalar_type()));
    multiply_int4(Call{x, packed, nullptr, data_or_null(bias), y, shape_of_rows(x), out_features, static_cast<int>(steps),
                       activation_of(activation), on.stream},
                  input_scale, static_cast<int>(group_size));
    return y;
}

}  // namespace
}  // namespace ds_compress

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CUDA, m) {
    m.impl("int8_linear_pack", TORCH_BOX(&ds_compress::int8_linear_pack));
    m.impl("int8_linear_quantize_pack", TORCH_BOX(&ds_compress::int8_linear_quantize_pack));
    m.impl("int8_linear", TORCH_BOX(&ds_compress::int8_linear));
    m.impl("int4_linear_pack", TORCH_BOX(&ds_compress::int4_linear_pack));
    m.impl("int4_linear", TORCH_BOX(&ds_compress::int4_linear));
    m.impl("sparse24_linear_pack", TORCH_BOX(&ds_compress::sparse24_linear_pack));
    m.impl("sparse24_linear", TORCH_BOX(&ds_compress::sparse24_linear));
}
