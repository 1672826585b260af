// Which kernels an int8 or int4 product takes on CUDA: those of Hopper, those of any GPU, or those that quantize x
// themselves.
#pragma once

#include "cuda.h"
#include "ds_compress/cuda_device.h"
#include "linear.h"
#include "verified.h"

namespace ds_compress::bindings {
namespace {

// The rows of x as quantized values, and behind them their scales: one piece of memory, to be filled.
class Rows {
public:
    Rows(const Tensor& x, int64_t rows, int64_t columns)
        : pitch(round_up(columns, 16)), count_(rows), memory_(new_tensor(x, {rows * (pitch + 4)}, kByte)) {}

    int8_t* quantized() const { return data<int8_t>(memory_); }
    float* scales() const { return reinterpret_cast<float*>(quantized() + count_ * pitch); }  // rows are whole 16 bytes

    const int64_t pitch;

private:
    int64_t count_;
    Tensor memory_;
};

inline Rows quantized_rows(const LinearCall& call, cudaStream_t stream) {
    const Rows rows(call.x, call.rows, call.weight.columns);
    check_launch(dsc_quantize_rows(call.x.const_data_ptr(), dtype_of(call.x), call.input_scale, call.rows,
                                   call.weight.columns, call.steps, rows.quantized(), rows.scales(), stream),
                 "quantize_rows");
    return rows;
}

// The wgmma kernels: where they are in the library, the GPU is one of theirs, TMA can reach rows and outputs, and there
// is enough to do for a tile.
inline bool hopper_serves(const LinearCall& call) {
    const auto& [outputs, columns, groups, group_size] = call.weight;
    if (dsc_hopper_product == nullptr || call.rows <= 16 || columns == 0 || outputs == 0) return false;
    if (major_version(call.x.get_device_index()) != 9) return false;
    const auto body = reinterpret_cast<uintptr_t>(call.packed.const_data_ptr()) + sizeof(PackedHeader);
    return body % 16 == 0 && outputs * static_cast<int64_t>(call.y.element_size()) % 16 == 0 &&
           reinterpret_cast<uintptr_t>(call.y.const_data_ptr()) % 16 == 0;
}

inline bool multiply_on_hopper(const char* op, const LinearCall& call, const Rows& rows, cudaStream_t stream) {
    if (!hopper_serves(call)) return false;
    const int device = call.x.get_device_index(), sms = multiprocessors(device);
    const int64_t outputs = call.weight.rows;
    const Way way{dsc_hopper_tile(call.rows, outputs, rows.pitch, sms)};
    if (verify(way, call.x, stream) != Verdict::right) return false;
    const auto* const weight = const_data<uint8_t>(call.packed) + sizeof(PackedHeader);
    const DscProduct product{rows.quantized(),
                             weight,
                             rows.scales(),
                             call.weight_scale,
                             call.bias,
                             call.y.mutable_data_ptr(),
                             dtype_of(call.y),
                             call.activation,
                             call.rows,
                             outputs,
                             rows.pitch,
                             device,
                             sms};
    check_launch(dsc_hopper_product(&product, way.tile, stream), op);
    return true;
}

// What every GPU has must be right; a capture that began before it was tried out takes it on trust.
inline void require_right(const char* op, const Way& way, const Tensor& x, cudaStream_t stream) {
    if (verify(way, x, stream) == Verdict::wrong)
        throw std::runtime_error(
            std::string(op) + ": " + way.name() +
            " give wrong sums on this GPU; set DS_COMPRESS_KERNELS=reference to train without them");
}

inline void multiply_int8(const LinearCall& call, cudaStream_t stream) {
    const char* const op = "int8_linear";
    const int64_t m = call.rows, n = call.weight.rows, k = call.weight.columns;
    const void* const packed = call.packed.const_data_ptr();
    void* const y = call.y.mutable_data_ptr();
    if (dsc_quantizes_itself(m, k)) {
        require_right(op, {Way::few_rows}, call.x, stream);
        check_launch(
            dsc_int8_linear_of(call.x.const_data_ptr(), dtype_of(call.x), call.input_scale, call.steps, packed,
                               call.weight_scale, call.bias, y, dtype_of(call.y), call.activation, m, n, k, stream),
            op);
        return;
    }
    const Rows rows = quantized_rows(call, stream);
    if (multiply_on_hopper(op, call, rows, stream)) return;
    require_right(op, {m <= 32 ? Way::few_rows : Way::any_gpu}, call.x, stream);
    check_launch(dsc_int8_linear(rows.quantized(), rows.scales(), packed, call.weight_scale, call.bias, y,
                                 dtype_of(call.y), call.activation, m, n, k, stream),
                 op);
}

inline void multiply_int4(const LinearCall& call, cudaStream_t stream) {
    const char* const op = "int4_linear";
    const int64_t m = call.rows, n = call.weight.rows, k = call.weight.columns;
    const int group = static_cast<int>(call.weight.group_size);
    const void* const packed = call.packed.const_data_ptr();
    void* const y = call.y.mutable_data_ptr();
    if (dsc_quantizes_itself(m, k)) {
        check_launch(dsc_int4_linear_of(call.x.const_data_ptr(), dtype_of(call.x), call.input_scale, call.steps, packed,
                                        call.bias, y, dtype_of(call.y), call.activation, m, n, k, group, stream),
                     op);
        return;
    }
    const Rows rows = quantized_rows(call, stream);
    check_launch(dsc_int4_linear(rows.quantized(), rows.scales(), packed, call.bias, y, dtype_of(call.y),
                                 call.activation, m, n, k, group, stream),
                 op);
}

}  // namespace
}  // namespace ds_compress::bindings
