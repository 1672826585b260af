// The elementwise ops on CUDA: a launch each.
#include "../cuda/elementwise/launchers.h"
#include "cuda.h"
#include "elementwise.h"

namespace ds_compress::bindings {
namespace {

struct Cuda {
    static void mask_apply(const Tensor& weights, const Tensor& packed, int64_t bit_offset, uint64_t fill) {
        const OnDevice on(weights);
        check_launch(dsc_mask_apply(weights.mutable_data_ptr(), static_cast<int>(weights.element_size()),
                                    weights.numel(), const_data<uint8_t>(packed), bit_offset, fill, on.stream),
                     "mask_apply_");
    }

    /// One launcher call for the tensors of each dtype.
    static void mask_apply_many(const std::vector<Tensor>& weights, const std::vector<Tensor>& packed,
                                const std::vector<int64_t>& bit_offsets, double fill) {
        const OnDevice on(weights[0]);
        std::vector<void*> values;
        std::vector<const uint8_t*> masks;
        std::vector<int64_t> bits, counts;
        for (const ScalarType type : {kFp32, kBf16, kFp16, kFp64}) {
            values.clear(), masks.clear(), bits.clear(), counts.clear();
            int size = 0;
            for (size_t i = 0; i < weights.size(); i++) {
                if (weights[i].scalar_type() != type) continue;
                values.push_back(weights[i].mutable_data_ptr());
                masks.push_back(const_data<uint8_t>(packed[i]));
                bits.push_back(bit_offsets[i]);
                counts.push_back(weights[i].numel());
                size = static_cast<int>(weights[i].element_size());
            }
            if (values.empty()) continue;
            check_launch(
                dsc_mask_apply_many(values.data(), masks.data(), bits.data(), counts.data(),
                                    static_cast<int64_t>(values.size()), size, pattern_of(fill, type), on.stream),
                "mask_apply_many_");
        }
    }

    static void mask_pack(const Tensor& mask, const Tensor& packed) {
        const OnDevice on(mask);
        check_launch(dsc_mask_pack(const_data<uint8_t>(mask), mask.numel(), data<uint8_t>(packed), on.stream),
                     "mask_pack");
    }

    static void mask_unpack(const Tensor& packed, int64_t bit_offset, const Tensor& mask) {
        const OnDevice on(packed);
        check_launch(
            dsc_mask_unpack(const_data<uint8_t>(packed), bit_offset, mask.numel(), data<uint8_t>(mask), on.stream),
            "mask_unpack");
    }

    static void mask_n_of_m(const Tensor& scores, int64_t n, int64_t m, const Tensor& packed) {
        const OnDevice on(scores);
        check_launch(dsc_mask_n_of_m(const_data<float>(scores), scores.size(0), scores.size(1), n, m,
                                     data<uint8_t>(packed), on.stream),
                     "mask_n_of_m");
    }

    static void fake_quantize(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& offset,
                              QuantRange range, bool with_mask, const FakeQuantized& to) {
        const OnDevice on(x);
        copy(scale, to.scale, on.stream);  // results do not alias arguments
        copy(offset, to.offset, on.stream);
        check_launch(
            dsc_fake_quantize(x.const_data_ptr(), to.y.mutable_data_ptr(), dtype_of(x), x.size(0), x.size(1),
                              scale.has_value(), to.scale.numel(), data<float>(to.scale),
                              range.symmetric ? nullptr : data<float>(to.offset), range.quant_min, range.quant_max,
                              range.steps, with_mask ? data<uint8_t>(to.mask) : nullptr, on.stream),
            "fake_quantize");
    }

    static void fake_quantize_float(const Tensor& x, const std::optional<Tensor>& scale,
                                    const std::optional<Tensor>& global_scale, const SmallFloat& number, int64_t block,
                                    bool with_mask, const FakeQuantizedFloat& to) {
        const OnDevice on(x);
        copy(scale, to.scale, on.stream);
        if (x.numel() == 0) return;
        check_launch(dsc_fake_quantize_float(
                         x.const_data_ptr(), to.y.mutable_data_ptr(), dtype_of(x), x.numel() / block, block,
                         scale.has_value(), to.scale.numel(), data<float>(to.scale),
                         const_data_or_null<float>(global_scale), number.exponent_bits, number.mantissa_bits,
                         number.largest, number.scale_kind, with_mask ? data<uint8_t>(to.mask) : nullptr, on.stream),
                     "fake_quantize_float");
    }

    static void block_quantize(const Tensor& x, const Tensor& payloads, const std::optional<Tensor>& residual,
                               int64_t chunk, PayloadFormat format) {
        const OnDevice on(x);
        check_launch(
            dsc_block_quantize(x.const_data_ptr(), dtype_of(x), x.numel(), data_or_null<float>(residual),
                               data<uint8_t>(payloads), payloads.size(0), chunk, format.bits, format.block, on.stream),
            "block_quantize");
    }

    static void block_dequantize(const Tensor& payloads, const Tensor& out, int64_t chunk, PayloadFormat format) {
        const OnDevice on(out);
        check_launch(dsc_block_dequantize(const_data<uint8_t>(payloads), payloads.size(0), chunk, format.bits,
                                          format.block, out.mutable_data_ptr(), dtype_of(out), out.numel(), on.stream),
                     "block_dequantize");
    }

    static void block_reduce(const Tensor& payloads, const Tensor& out, PayloadFormat format, float multiplier) {
        const OnDevice on(out);
        check_launch(dsc_block_reduce(const_data<uint8_t>(payloads), payloads.size(0), out.numel(), format.bits,
                                      format.block, multiplier, data<float>(out), on.stream),
                     "block_reduce");
    }

    static void block_reduce_quantize(const Tensor& payloads, const Tensor& payload,
                                      const std::optional<Tensor>& residual, int64_t numel, PayloadFormat format,
                                      float multiplier) {
        const OnDevice on(payloads);
        check_launch(
            dsc_block_reduce_quantize(const_data<uint8_t>(payloads), payloads.size(0), numel, format.bits, format.block,
                                      multiplier, data_or_null<float>(residual), data<uint8_t>(payload), on.stream),
            "block_reduce_quantize");
    }

private:
    static void copy(const std::optional<Tensor>& from, const Tensor& to, cudaStream_t stream) {
        if (!from || from->numel() == 0) return;
        check_launch(cudaMemcpyAsync(to.mutable_data_ptr(), from->const_data_ptr(),
                                     4 * static_cast<size_t>(from->numel()), cudaMemcpyDeviceToDevice, stream),
                     "fake_quantize");
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CUDA, m) { Elementwise<Cuda>::register_in(m); }

}  // namespace ds_compress::bindings
