// Masks, fake quantization and messages of a reduction on CUDA.
#include "cuda.h"

#include "../cuda/elementwise/launchers.h"
#include "elementwise_checks.h"

#include <tuple>
#include <vector>

namespace ds_compress::bindings {
namespace {

constexpr ScalarType kFp32 = ScalarType::Float, kBf16 = ScalarType::BFloat16, kFp16 = ScalarType::Half;

int dtype_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::BFloat16:
            return dsc_bfloat16;
        case ScalarType::Half:
            return dsc_float16;
        case ScalarType::Double:
            return dsc_float64;
        default:
            return dsc_float32;
    }
}

template <class T>
T* data(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
const T* data_const(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

float* data_or_null(const std::optional<Tensor>& tensor) { return tensor ? data<float>(*tensor) : nullptr; }

// --- masks --------------------------------------------------------------------------------------------------------

void mask_apply_(const Tensor& weights, const Tensor& packed, int64_t bit_offset, double fill) {
    check_governed("mask_apply_", "weights", weights, packed, bit_offset);
    const OnDevice on(weights);
    check_launch(dsc_mask_apply(weights.mutable_data_ptr(), static_cast<int>(weights.element_size()), weights.numel(),
                                data_const<uint8_t>(packed), bit_offset, pattern_of(fill, weights.scalar_type()),
                                on.stream),
                 "mask_apply_");
}

Tensor mask_apply_count_(const Tensor& weights, const Tensor& packed, int64_t bit_offset) {
    check_governed("mask_apply_count_", "weights", weights, packed, bit_offset);
    const OnDevice on(weights);
    Tensor count = torch::stable::new_zeros(weights, {}, ScalarType::Long);
    check_launch(dsc_mask_apply_count(weights.mutable_data_ptr(), static_cast<int>(weights.element_size()),
                                      weights.numel(), data_const<uint8_t>(packed), bit_offset, data<int64_t>(count),
                                      on.stream),
                 "mask_apply_count_");
    return count;
}

/// One launcher call for the tensors of each dtype.
cudaError_t apply_masks(const std::vector<Tensor>& weights, const std::vector<Tensor>& packed,
                        const std::vector<int64_t>& bit_offsets, double fill, cudaStream_t stream) {
    std::vector<void*> values;
    std::vector<const uint8_t*> masks;
    std::vector<int64_t> bits, counts;
    for (const ScalarType type : {kFp32, kBf16, kFp16, ScalarType::Double}) {
        values.clear(), masks.clear(), bits.clear(), counts.clear();
        for (size_t i = 0; i < weights.size(); i++) {
            if (weights[i].scalar_type() != type) continue;
            values.push_back(weights[i].mutable_data_ptr());
            masks.push_back(data_const<uint8_t>(packed[i]));
            bits.push_back(bit_offsets[i]);
            counts.push_back(weights[i].numel());
        }
        if (values.empty()) continue;
        const int size = type == ScalarType::Double ? 8 : type == kFp32 ? 4 : 2;
        const cudaError_t error =
            dsc_mask_apply_many(values.data(), masks.data(), bits.data(), counts.data(),
                                static_cast<int64_t>(values.size()), size, pattern_of(fill, type), stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

void mask_apply_adam_(const Tensor& weights, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& packed,
                      int64_t bit_offset) {
    check_adam(weights, exp_avg, exp_avg_sq, packed, bit_offset);
    const OnDevice on(weights);
    check_launch(apply_masks({weights, exp_avg, exp_avg_sq}, {packed, packed, packed},
                             {bit_offset, bit_offset, bit_offset}, 0.0, on.stream),
                 "mask_apply_adam_");
}

void mask_apply_many_(std::vector<Tensor> weights, std::vector<Tensor> packed, std::vector<int64_t> bit_offsets,
                      double fill) {
    check_many(weights, packed, bit_offsets);
    if (weights.empty()) return;
    const OnDevice on(weights[0]);
    check_launch(apply_masks(weights, packed, bit_offsets, fill, on.stream), "mask_apply_many_");
}

Tensor mask_pack(const Tensor& keep) {
    check("mask_pack", "keep", keep, 1, {ScalarType::Bool});
    const OnDevice on(keep);
    Tensor packed = torch::stable::new_empty(keep, {(keep.numel() + 7) / 8}, ScalarType::Byte);
    check_launch(dsc_mask_pack(data_const<uint8_t>(keep), keep.numel(), data<uint8_t>(packed), on.stream), "mask_pack");
    return packed;
}

Tensor mask_unpack(const Tensor& packed, int64_t numel, int64_t bit_offset) {
    check_bits("mask_unpack", packed, numel, bit_offset);
    const OnDevice on(packed);
    Tensor keep = torch::stable::new_empty(packed, {numel}, ScalarType::Bool);
    check_launch(dsc_mask_unpack(data_const<uint8_t>(packed), bit_offset, numel, data<uint8_t>(keep), on.stream),
                 "mask_unpack");
    return keep;
}

Tensor mask_n_of_m(const Tensor& scores, int64_t n, int64_t m) {
    check_n_of_m(scores, n, m);
    const OnDevice on(scores);
    Tensor packed = torch::stable::new_empty(scores, {(scores.numel() + 7) / 8}, ScalarType::Byte);
    check_launch(dsc_mask_n_of_m(data_const<float>(scores), scores.size(0), scores.size(1), n, m,
                                 data<uint8_t>(packed), on.stream),
                 "mask_n_of_m");
    return packed;
}

Tensor magnitude_histogram(const Tensor& values, int64_t shift, int64_t bins, int64_t prefix_shift, int64_t prefix) {
    check_histogram(values, shift, bins, prefix_shift);
    const OnDevice on(values);
    Tensor counts = torch::stable::new_zeros(values, {bins}, ScalarType::Long);
    check_launch(dsc_magnitude_histogram(values.const_data_ptr(), dtype_of(values), values.numel(),
                                         static_cast<int>(shift), static_cast<int>(bins),
                                         static_cast<int>(prefix_shift), prefix, data<int64_t>(counts), on.stream),
                 "magnitude_histogram");
    return counts;
}

// --- fake quantization --------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quantize(const Tensor& x, const std::optional<Tensor>& scale,
                                                         const std::optional<Tensor>& offset, int64_t low,
                                                         int64_t high, int64_t steps, bool symmetric, bool keep) {
    check_fake_quantize(x, scale, offset, low, high, steps, symmetric);
    const OnDevice on(x);
    const int64_t ranges = scale ? scale->numel() : x.size(0);
    Tensor y = torch::stable::empty_like(x);
    // Results do not alias arguments: given ranges are copied.
    Tensor scales = scale ? torch::stable::clone(*scale) : torch::stable::new_empty(x, {ranges}, kFp32);
    Tensor offsets = offset ? torch::stable::clone(*offset)
                            : torch::stable::new_empty(x, {symmetric ? 0 : ranges}, kFp32);
    Tensor kept = torch::stable::new_empty(x, {keep ? (x.numel() + 7) / 8 : 0}, ScalarType::Byte);
    check_launch(dsc_fake_quantize(x.const_data_ptr(), y.mutable_data_ptr(), dtype_of(x), x.size(0), x.size(1),
                                   scale.has_value(), ranges, data<float>(scales),
                                   symmetric ? nullptr : data<float>(offsets), static_cast<int>(low),
                                   static_cast<int>(high), static_cast<int>(steps),
                                   keep ? data<uint8_t>(kept) : nullptr, on.stream),
                 "fake_quantize");
    return {y, scales, offsets, kept};
}

// --- messages of a reduction --------------------------------------------------------------------------------------

void block_quantize(const Tensor& x, const Tensor& messages, const std::optional<Tensor>& residual, int64_t chunk,
                    int64_t bits, int64_t block) {
    const char* op = "block_quantize";
    check_format(op, bits, block);
    check(op, "x", x, 1, {kFp32, kBf16, kFp16});
    check_messages(op, messages, x.numel(), chunk, bits, block);
    check_same_device(op, "messages", messages, x);
    check_residual(op, residual, x.numel(), x);
    const OnDevice on(x);
    check_launch(dsc_block_quantize(x.const_data_ptr(), dtype_of(x), x.numel(), data_or_null(residual),
                                    data<uint8_t>(messages), messages.size(0), chunk, static_cast<int>(bits),
                                    static_cast<int>(block), on.stream),
                 op);
}

void block_dequantize(const Tensor& messages, const Tensor& out, int64_t chunk, int64_t bits, int64_t block) {
    const char* op = "block_dequantize";
    check_format(op, bits, block);
    check(op, "out", out, 1, {kFp32, kBf16, kFp16});
    check_messages(op, messages, out.numel(), chunk, bits, block);
    check_same_device(op, "messages", messages, out);
    const OnDevice on(out);
    check_launch(dsc_block_dequantize(data_const<uint8_t>(messages), messages.size(0), chunk, static_cast<int>(bits),
                                      static_cast<int>(block), out.mutable_data_ptr(), dtype_of(out), out.numel(),
                                      on.stream),
                 op);
}

void block_reduce(const Tensor& messages, const Tensor& out, int64_t bits, int64_t block, double multiplier) {
    const char* op = "block_reduce";
    check_format(op, bits, block);
    check(op, "out", out, 1, {kFp32});
    check_summands(op, messages, out.numel(), bits, block);
    check_same_device(op, "messages", messages, out);
    const OnDevice on(out);
    check_launch(dsc_block_reduce(data_const<uint8_t>(messages), messages.size(0), out.numel(),
                                  static_cast<int>(bits), static_cast<int>(block), static_cast<float>(multiplier),
                                  data<float>(out), on.stream),
                 op);
}

void block_reduce_quantize(const Tensor& messages, const Tensor& message, const std::optional<Tensor>& residual,
                           int64_t numel, int64_t bits, int64_t block, double multiplier) {
    const char* op = "block_reduce_quantize";
    check_format(op, bits, block);
    check_summands(op, messages, numel, bits, block);
    check(op, "message", message, 1, {ScalarType::Byte});
    check_same_device(op, "message", message, messages);
    require(message.numel() == messages.size(1), op, ": message has ", message.numel(), " bytes, the summands ",
            messages.size(1));
    check_residual(op, residual, numel, messages);
    const OnDevice on(messages);
    check_launch(dsc_block_reduce_quantize(data_const<uint8_t>(messages), messages.size(0), numel,
                                           static_cast<int>(bits), static_cast<int>(block),
                                           static_cast<float>(multiplier), data_or_null(residual),
                                           data<uint8_t>(message), on.stream),
                 op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CUDA, m) {
    m.impl("mask_apply_", TORCH_BOX(&mask_apply_));
    m.impl("mask_apply_count_", TORCH_BOX(&mask_apply_count_));
    m.impl("mask_apply_adam_", TORCH_BOX(&mask_apply_adam_));
    m.impl("mask_apply_many_", TORCH_BOX(&mask_apply_many_));
    m.impl("mask_pack", TORCH_BOX(&mask_pack));
    m.impl("mask_unpack", TORCH_BOX(&mask_unpack));
    m.impl("mask_n_of_m", TORCH_BOX(&mask_n_of_m));
    m.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram));
    m.impl("fake_quantize", TORCH_BOX(&fake_quantize));
    m.impl("block_quantize", TORCH_BOX(&block_quantize));
    m.impl("block_dequantize", TORCH_BOX(&block_dequantize));
    m.impl("block_reduce", TORCH_BOX(&block_reduce));
    m.impl("block_reduce_quantize", TORCH_BOX(&block_reduce_quantize));
}

}  // namespace ds_compress::bindings
