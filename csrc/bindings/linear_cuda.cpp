// The integer linear layers on CUDA: packing; how products are made is in products_cuda.h.
//
// The header of a packed weight lies on the device and is not read, which would wait for the GPU: a weight is packed
// on the device that uses it.
#include "products_cuda.h"

namespace ds_compress::bindings {
namespace {

struct Cuda {
    static Tensor int8_pack(const Tensor& quantized) {
        const int64_t rows = quantized.size(0), columns = quantized.size(1);
        const OnDevice on(quantized);
        const Tensor packed = new_packed(quantized, {rows, columns}, on.stream);
        check_launch(dsc_int8_pack(const_data<int8_t>(quantized), rows, columns, packed.mutable_data_ptr(), on.stream),
                     "int8_linear_pack");
        return packed;
    }

    static Tensor int8_quantize_pack(const Tensor& values, const Tensor& scale, int steps) {
        const int64_t rows = values.size(0), columns = values.size(1);
        const OnDevice on(values);
        const Tensor packed = new_packed(values, {rows, columns}, on.stream);
        check_launch(
            dsc_int8_quantize_pack(values.const_data_ptr(), dtype_of(values), const_data<float>(scale),
                                   scale.size(0) != rows, rows, columns, steps, packed.mutable_data_ptr(), on.stream),
            "int8_linear_quantize_pack");
        return packed;
    }

    static Tensor int4_pack(const Tensor& quantized, const Tensor& scale) {
        const int64_t rows = quantized.size(0), columns = quantized.size(1), groups = scale.size(1);
        int group = 0;
        for (int candidate : {32, 64, 128})
            if ((columns + candidate - 1) / candidate == groups) group = candidate;
        require(group > 0, "int4 weights on CUDA have groups of 32, 64 or 128 columns; ", groups, " groups of ",
                columns, " columns are none of these");
        const OnDevice on(quantized);
        const Tensor packed = new_packed(quantized, {rows, columns, groups}, on.stream);
        check_launch(dsc_int4_pack(const_data<int8_t>(quantized), const_data<float>(scale), rows, columns, group,
                                   packed.mutable_data_ptr(), on.stream),
                     "int4_linear_pack");
        return packed;
    }

    static WeightShape int8_weight(const Tensor& x, const Tensor& packed, const Tensor& weight_scale) {
        require(x.dim() > 0, "x is (..., in_features), got ", shape_of(x));
        return checked(packed, {weight_scale.numel(), x.size(x.dim() - 1)});
    }

    static WeightShape int4_weight(const Tensor& x, const Tensor& packed, int64_t out_features, int64_t group_size) {
        require(group_size == 32 || group_size == 64 || group_size == 128, "group_size is 32, 64 or 128 on CUDA, got ",
                group_size);
        require(x.dim() > 0, "x is (..., in_features), got ", shape_of(x));
        const int64_t columns = x.size(x.dim() - 1);
        return checked(packed, {out_features, columns, (columns + group_size - 1) / group_size, group_size});
    }

    static void int8_linear(const LinearCall& call) {
        const OnDevice on(call.x);
        multiply_int8(call, on.stream);
    }

    static void int4_linear(const LinearCall& call) {
        const OnDevice on(call.x);
        multiply_int4(call, on.stream);
    }

private:
    static int64_t bytes_of(const WeightShape& weight) {
        return packed_bytes(weight.rows, weight.columns, weight.groups > 0 ? 4 : 8, weight.groups);
    }

    /// Zeros behind what the kernel writes, too: equal weights have equal bytes.
    static Tensor new_packed(const Tensor& like, const WeightShape& weight, cudaStream_t stream) {
        const int64_t bytes = bytes_of(weight);
        const Tensor packed = new_tensor(like, {bytes}, kByte);
        check_launch(cudaMemsetAsync(packed.mutable_data_ptr(), 0, static_cast<size_t>(bytes), stream), "packing");
        return packed;
    }

    static WeightShape checked(const Tensor& packed, const WeightShape& weight) {
        require(packed.scalar_type() == kByte && packed.dim() == 1 && packed.size(0) == bytes_of(weight),
                "a packed weight of (", weight.rows, ", ", weight.columns, ") is uint8 (", bytes_of(weight), ",), got ",
                described(packed));
        return weight;
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CUDA, m) { Linear<Cuda>::register_in(m); }

}  // namespace ds_compress::bindings
