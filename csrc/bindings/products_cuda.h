// Which kernels a product of codes takes on CUDA: those of Hopper, those of any GPU, or those that quantize x themselves.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cuda.h"
#include "linear_checks.h"
#include "verified.h"

namespace ds_compress {
namespace {

using bindings::check_launch;
using bindings::new_tensor;

inline int dtype_of(ScalarType type) {
    if (type == ScalarType::BFloat16) return dsc_bfloat16;
    return type == ScalarType::Half ? dsc_float16 : dsc_float32;
}

inline const float* data_or_null(const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

struct Shape {
    int64_t rows, columns;
};

inline Shape shape_of_rows(const Tensor& x) {
    Shape shape{1, x.size(x.dim() - 1)};
    for (int64_t i = 0; i + 1 < x.dim(); i++) shape.rows *= x.size(i);
    return shape;
}

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// The rows of x as codes, and behind them their scales: one piece of memory.
class Rows {
public:
    Rows(const Tensor& x, Shape shape, const std::optional<Tensor>& input_scale, int64_t steps, cudaStream_t stream)
        : pitch(round_up(shape.columns, 16)), count_(shape.rows),
          memory_(new_tensor(x, {shape.rows * (pitch + 4)}, ScalarType::Byte)) {
        check_launch(dsc_quantize_rows(x.const_data_ptr(), dtype_of(x.scalar_type()), data_or_null(input_scale), shape.rows,
                                       shape.columns, static_cast<int>(steps), codes(), scales(), stream),
                     "quantize_rows");
    }
    int8_t* codes() const { return static_cast<int8_t*>(memory_.mutable_data_ptr()); }
    float* scales() const { return reinterpret_cast<float*>(codes() + count_ * pitch); }  // rows are whole 16 bytes

    const int64_t pitch;

private:
    int64_t count_;
    Tensor memory_;
};

// What every way of multiplying is told.
struct Call {
    const Tensor &x, &packed;
    const float *weight_scale, *bias;  // or null
    Tensor& y;
    Shape shape;
    int64_t outputs;
    int steps, activation;
    cudaStream_t stream;
    int x_dtype() const { return dtype_of(x.scalar_type()); }
    int y_dtype() const { return dtype_of(y.scalar_type()); }
};

// The wgmma kernels: where they are in the library, the GPU is one of theirs, TMA can reach rows and outputs, and there is enough
// to do for a tile.
inline bool hopper_serves(const Call& call) {
    if (dsc_hopper_product == nullptr || call.shape.rows <= 16 || call.shape.columns == 0 || call.outputs == 0) return false;
    if (bindings::major_version(call.x.get_device_index()) != 9) return false;
    const auto body = reinterpret_cast<uintptr_t>(call.packed.const_data_ptr()) + sizeof(PackedHeader);
    return body % 16 == 0 && call.outputs * static_cast<int64_t>(call.y.element_size()) % 16 == 0 &&
           reinterpret_cast<uintptr_t>(call.y.const_data_ptr()) % 16 == 0;
}

inline bool multiply_on_hopper(const char* op, const Call& call, const Rows& rows) {
    if (!hopper_serves(call)) return false;
    const int device = call.x.get_device_index(), sms = bindings::multiprocessors(device);
    const Way way{dsc_hopper_tile(call.shape.rows, call.outputs, rows.pitch, sms)};
    if (verify(way, call.x, call.stream) != Verdict::right) return false;
    const auto* const weight = static_cast<const uint8_t*>(call.packed.const_data_ptr()) + sizeof(PackedHeader);
    const DscProduct product{rows.codes(), weight, rows.scales(), call.weight_scale, call.bias, call.y.mutable_data_ptr(),
                             call.y_dtype(), call.activation, call.shape.rows, call.outputs, rows.pitch, device, sms};
    check_launch(dsc_hopper_product(&product, way.tile, call.stream), op);
    return true;
}

// What every GPU has must be right; a capture that began before it was tried out takes it on trust.
inline void require_right(const char* op, const Way& way, const Call& call) {
    if (verify(way, call.x, call.stream) == Verdict::wrong)
        throw std::runtime_error(std::string(op) + ": " + way.name() +
                                 " give wrong sums on this GPU; set DS_COMPRESS_KERNELS=reference to train without them");
}

inline void multiply_int8(const Call& call, const std::optional<Tensor>& input_scale) {
    const char* const op = "int8_linear";
    const auto [m, k] = call.shape;
    const void *x = call.x.const_data_ptr(), *packed = call.packed.const_data_ptr();
    void* const y = call.y.mutable_data_ptr();
    if (dsc_quantizes_itself(m, k)) {
        require_right(op, {Way::few_rows}, call);
        check_launch(dsc_int8_linear_of(x, call.x_dtype(), data_or_null(input_scale), call.steps, packed, call.weight_scale,
                                        call.bias, y, call.y_dtype(), call.activation, m, call.outputs, k, call.stream),
                     op);
        return;
    }
    const Rows rows(call.x, call.shape, input_scale, call.steps, call.stream);
    if (multiply_on_hopper(op, call, rows)) return;
    require_right(op, {m <= 32 ? Way::few_rows : Way::any_gpu}, call);
    check_launch(dsc_int8_linear(rows.codes(), rows.scales(), packed, call.weight_scale, call.bias, y, call.y_dtype(),
                                 call.activation, m, call.outputs, k, call.stream),
                 op);
}

inline void multiply_sparse24(const Call& call, const std::optional<Tensor>& input_scale) {
    const Rows rows(call.x, call.shape, input_scale, call.steps, call.stream);
    check_launch(dsc_sparse24_linear(rows.codes(), rows.scales(), call.packed.const_data_ptr(), call.weight_scale, call.bias,
                                     call.y.mutable_data_ptr(), call.y_dtype(), call.activation, call.shape.rows, call.outputs,
                                     call.shape.columns, call.stream),
                 "sparse24_linear");
}

inline void multiply_int4(const Call& call, const std::optional<Tensor>& input_scale, int group) {
    const char* const op = "int4_linear";
    const auto [m, k] = call.shape;
    void* const y = call.y.mutable_data_ptr();
    if (dsc_quantizes_itself(m, k)) {
        check_launch(dsc_int4_linear_of(call.x.const_data_ptr(), call.x_dtype(), data_or_null(input_scale), call.steps,
                                        call.packed.const_data_ptr(), call.bias, y, call.y_dtype(), call.activation, m,
                                        call.outputs, k, group, call.stream),
                     op);
        return;
    }
    const Rows rows(call.x, call.shape, input_scale, call.steps, call.stream);
    check_launch(dsc_int4_linear(rows.codes(), rows.scales(), call.packed.const_data_ptr(), call.bias, y, call.y_dtype(),
                                 call.activation, m, call.outputs, k, group, call.stream),
                 op);
}

}  // namespace
}  // namespace ds_compress
