// The integer linear layers of many experts on CUDA: rows are quantized, then one launch multiplies all of them.
// Offsets stay on the device, so nothing waits for it.
#include "grouped_linear.h"

#include "products_cuda.h"

namespace ds_compress::bindings {
namespace {

struct Cuda {
    static WeightShape int8_experts(const Tensor& x, const Tensor& packed, const Tensor& weight_scale) {
        return checked(packed, {weight_scale.size(1), x.size(1)});
    }

    static WeightShape int4_experts(const Tensor& x, const Tensor& packed, int64_t out_features, int64_t group_size) {
        require(group_size == 32 || group_size == 64 || group_size == 128, "group_size is 32, 64 or 128 on CUDA, got ",
                group_size);
        const int64_t columns = x.size(1);
        return checked(packed, {out_features, columns, (columns + group_size - 1) / group_size, group_size});
    }

    static void int8_grouped_linear(const GroupedCall& call) {
        const char* const op = "int8_grouped_linear";
        const OnDevice on(call.x);
        if (call.rows == 0) return;
        require_right(op, {Way::grouped}, call.x, on.stream);
        const Rows rows = quantized_rows(call, on.stream);
        check_launch(
            dsc_int8_grouped_linear(rows.quantized(), rows.scales(), call.packed.const_data_ptr(), call.packed.size(1),
                                    call.weight_scale, call.bias, call.offsets.const_data_ptr(), is_wide(call),
                                    call.experts, call.y.mutable_data_ptr(), dtype_of(call.y), call.rows,
                                    call.weight.rows, call.weight.columns, on.stream),
            op);
    }

    static void int4_grouped_linear(const GroupedCall& call) {
        const OnDevice on(call.x);
        if (call.rows == 0) return;
        const Rows rows = quantized_rows(call, on.stream);
        check_launch(
            dsc_int4_grouped_linear(rows.quantized(), rows.scales(), call.packed.const_data_ptr(), call.packed.size(1),
                                    call.bias, call.offsets.const_data_ptr(), is_wide(call), call.experts,
                                    call.y.mutable_data_ptr(), dtype_of(call.y), call.rows, call.weight.rows,
                                    call.weight.columns, static_cast<int>(call.weight.group_size), on.stream),
            "int4_grouped_linear");
    }

private:
    static int is_wide(const GroupedCall& call) { return call.offsets.scalar_type() == ScalarType::Long; }

    static Rows quantized_rows(const GroupedCall& call, cudaStream_t stream) {
        const Rows rows(call.x, call.rows, call.weight.columns);
        const void* const x = call.x.const_data_ptr();
        const int dtype = dtype_of(call.x);
        check_launch(call.input_scale == nullptr
                         ? dsc_quantize_rows(x, dtype, nullptr, call.rows, call.weight.columns, call.steps,
                                             rows.quantized(), rows.scales(), stream)
                         : dsc_quantize_expert_rows(x, dtype, call.input_scale, call.offsets.const_data_ptr(),
                                                    is_wide(call), call.experts, call.rows, call.weight.columns,
                                                    call.steps, rows.quantized(), rows.scales(), stream),
                     "quantize_rows");
        return rows;
    }

    static WeightShape checked(const Tensor& packed, const WeightShape& weight) {
        const int64_t bytes = packed_bytes(weight.rows, weight.columns, weight.groups > 0 ? 4 : 8, weight.groups);
        require(packed.size(1) == bytes, "packed weights of (", weight.rows, ", ", weight.columns, ") have ", bytes,
                " bytes each, got ", described(packed));
        return weight;
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CUDA, m) { GroupedLinear<Cuda>::register_in(m); }

}  // namespace ds_compress::bindings
