// The elementwise ops on the CPU.
#pragma once

#include "../cpu/elementwise/kernels.h"
#include "elementwise.h"

namespace ds_compress::bindings {

/// See elementwise.h. Work is cut into ranges for threads; the kernels are those of ../cpu/elementwise.
struct Cpu {
    static void mask_apply(const Tensor& weights, const Tensor& packed, int64_t bit_offset, uint64_t fill);
    static void mask_apply_many(const std::vector<Tensor>& weights, const std::vector<Tensor>& packed,
                                const std::vector<int64_t>& bit_offsets, double fill);
    static void mask_pack(const Tensor& mask, const Tensor& packed);
    static void mask_unpack(const Tensor& packed, int64_t bit_offset, const Tensor& mask);
    static void mask_n_of_m(const Tensor& scores, int64_t n, int64_t m, const Tensor& packed);
    static void fake_quantize(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& offset,
                              QuantRange range, bool with_mask, const FakeQuantized& to);
    static void fake_quantize_float(const Tensor& x, const std::optional<Tensor>& scale,
                                    const std::optional<Tensor>& global_scale, const SmallFloat& number, int64_t block,
                                    bool with_mask, const FakeQuantizedFloat& to);
    static void block_quantize(const Tensor& x, const Tensor& payloads, const std::optional<Tensor>& residual,
                               int64_t chunk, PayloadFormat format);
    static void block_dequantize(const Tensor& payloads, const Tensor& out, int64_t chunk, PayloadFormat format);
    static void block_reduce(const Tensor& payloads, const Tensor& out, PayloadFormat format, float multiplier);
    static void block_reduce_quantize(const Tensor& payloads, const Tensor& payload,
                                      const std::optional<Tensor>& residual, int64_t numel, PayloadFormat format,
                                      float multiplier);
};

inline cpu::Float float_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case kBf16:
            return cpu::Float::bf16;
        case kFp16:
            return cpu::Float::fp16;
        default:
            return cpu::Float::fp32;
    }
}

// Pieces of work go to threads in runs of about this many elements: less is not worth waking a thread for.
constexpr int64_t kElementsPerThread = int64_t{1} << 15;

// Calls run(begin, end) on ranges of [0, count) in threads; ranges begin at multiples of `step`.
template <class Run>
void in_ranges(int64_t count, int64_t step, const Run& run) {
    const int64_t pieces = (count + step - 1) / step;
    const int64_t grain = (kElementsPerThread + step - 1) / step;
    torch::stable::parallel_for(0, pieces, grain, [&](int64_t first, int64_t last) {
        const int64_t end = last * step;
        run(first * step, end < count ? end : count);
    });
}

}  // namespace ds_compress::bindings
