// Masks, N:M selection and magnitude histograms on the CPU.
#include "ds_compress/math.h"
#include "elementwise_cpu.h"

#include <atomic>
#include <vector>

namespace ds_compress::bindings {
namespace {

constexpr int64_t kMaskStep = 4096;  // elements: whole bytes of the mask and whole vectors of any dtype

cpu::Mask mask_of(const Tensor& packed, int64_t bit) {
    return {static_cast<const uint8_t*>(packed.data_ptr()), packed.numel(), bit};
}

cpu::Mask from(cpu::Mask mask, int64_t element) { return {mask.packed, mask.bytes, mask.bit + element}; }

uint8_t* at(const Tensor& tensor, int64_t element) {
    return static_cast<uint8_t*>(tensor.data_ptr()) + element * static_cast<int64_t>(tensor.element_size());
}

void mask_apply_(const Tensor& weights, const Tensor& packed, int64_t bit_offset, double fill) {
    check_governed("mask_apply_", "weights", weights, packed, bit_offset);
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const auto size = static_cast<int>(weights.element_size());
    const uint64_t pattern = pattern_of(fill, weights.scalar_type());
    const cpu::Mask mask = mask_of(packed, bit_offset);
    in_ranges(weights.numel(), kMaskStep, [&](int64_t begin, int64_t end) {
        kernels.mask_apply(at(weights, begin), size, end - begin, from(mask, begin), pattern);
    });
}

Tensor mask_apply_count_(const Tensor& weights, const Tensor& packed, int64_t bit_offset) {
    check_governed("mask_apply_count_", "weights", weights, packed, bit_offset);
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const auto size = static_cast<int>(weights.element_size());
    const cpu::Mask mask = mask_of(packed, bit_offset);
    std::atomic<int64_t> total{0};
    in_ranges(weights.numel(), kMaskStep, [&](int64_t begin, int64_t end) {
        total += kernels.mask_apply_count(at(weights, begin), size, end - begin, from(mask, begin));
    });
    Tensor result = torch::stable::new_empty(weights, {}, ScalarType::Long);
    *static_cast<int64_t*>(result.data_ptr()) = total;
    return result;
}

void mask_apply_adam_(const Tensor& weights, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& packed,
                      int64_t bit_offset) {
    check_adam(weights, exp_avg, exp_avg_sq, packed, bit_offset);
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const Tensor* parts[] = {&weights, &exp_avg, &exp_avg_sq};
    const cpu::Mask mask = mask_of(packed, bit_offset);
    in_ranges(weights.numel(), kMaskStep, [&](int64_t begin, int64_t end) {
        // In short turns: the bits of a turn are read from memory once.
        for (int64_t i = begin; i < end; i += kMaskStep) {
            const int64_t count = end - i < kMaskStep ? end - i : kMaskStep;
            for (const Tensor* part : parts)
                kernels.mask_apply(at(*part, i), static_cast<int>(part->element_size()), count,
                                              from(mask, i), 0);
        }
    });
}

void mask_apply_many_(std::vector<Tensor> weights, std::vector<Tensor> packed, std::vector<int64_t> bit_offsets,
                      double fill) {
    check_many(weights, packed, bit_offsets);
    for (size_t i = 0; i < weights.size(); i++) mask_apply_(weights[i], packed[i], bit_offsets[i], fill);
}

Tensor mask_pack(const Tensor& keep) {
    check("mask_pack", "keep", keep, 1, {ScalarType::Bool});
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const int64_t count = keep.numel();
    Tensor packed = torch::stable::new_empty(keep, {(count + 7) / 8}, ScalarType::Byte);
    auto* to = static_cast<uint8_t*>(packed.data_ptr());
    in_ranges(count, kMaskStep, [&](int64_t begin, int64_t end) {
        kernels.mask_pack(at(keep, begin), end - begin, to + begin / 8);
    });
    return packed;
}

Tensor mask_unpack(const Tensor& packed, int64_t numel, int64_t bit_offset) {
    check_bits("mask_unpack", packed, numel, bit_offset);
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    Tensor keep = torch::stable::new_empty(packed, {numel}, ScalarType::Bool);
    const cpu::Mask mask = mask_of(packed, bit_offset);
    in_ranges(numel, kMaskStep, [&](int64_t begin, int64_t end) {
        kernels.mask_unpack(from(mask, begin), end - begin, at(keep, begin));
    });
    return keep;
}

Tensor mask_n_of_m(const Tensor& scores, int64_t n, int64_t m) {
    check_n_of_m(scores, n, m);
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    int64_t rows = scores.size(0), columns = scores.size(1);
    const int64_t count = rows * columns;
    Tensor packed = torch::stable::new_empty(scores, {(count + 7) / 8}, ScalarType::Byte);
    const auto* values = static_cast<const float*>(scores.data_ptr());
    auto* to = static_cast<uint8_t*>(packed.data_ptr());
    const auto run = [&](int64_t first, int64_t height, int64_t width) {
        kernels.mask_n_of_m(values + first, height, width, static_cast<int>(n), static_cast<int>(m),
                                       to + first / 8);
    };
    if (columns % m == 0) {  // no run is short: rows do not matter, and a range is whole runs and whole bytes
        in_ranges(count, m * 64, [&](int64_t begin, int64_t end) { run(begin, 1, end - begin); });
    } else {
        in_ranges(count, columns * 8, [&](int64_t begin, int64_t end) { run(begin, (end - begin) / columns, columns); });
    }
    return packed;
}

Tensor magnitude_histogram(const Tensor& values, int64_t shift, int64_t bins, int64_t prefix_shift, int64_t prefix) {
    check_histogram(values, shift, bins, prefix_shift);
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    // Few ranges, because each has histograms of its own to clear and to add up.
    constexpr int64_t kStep = int64_t{1} << 20;
    const int64_t ranges = (values.numel() + kStep - 1) / kStep;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t parts = ranges < threads ? (ranges < 1 ? 1 : ranges) : threads;
    std::vector<int64_t> counts(static_cast<size_t>(parts * bins));
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
        std::vector<uint32_t> scratch(static_cast<size_t>(4 * bins));
        for (int64_t part = first; part < last; part++)
            for (int64_t begin = ranges * part / parts * kStep; begin < ranges * (part + 1) / parts * kStep;
                 begin += kStep) {
                const int64_t left = values.numel() - begin;
                kernels.magnitude_histogram(
                    at(values, begin), float_of(values), left < kStep ? left : kStep, static_cast<int>(shift),
                    static_cast<int>(bins), static_cast<int>(prefix_shift), prefix, scratch.data(),
                    counts.data() + part * bins);
            }
    });
    Tensor result = torch::stable::new_empty(values, {bins}, ScalarType::Long);
    auto* to = static_cast<int64_t*>(result.data_ptr());
    for (int64_t bin = 0; bin < bins; bin++) {
        to[bin] = 0;
        for (int64_t part = 0; part < parts; part++) to[bin] += counts[static_cast<size_t>(part * bins + bin)];
    }
    return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CPU, m) {
    m.impl("mask_apply_", TORCH_BOX(&mask_apply_));
    m.impl("mask_apply_count_", TORCH_BOX(&mask_apply_count_));
    m.impl("mask_apply_adam_", TORCH_BOX(&mask_apply_adam_));
    m.impl("mask_apply_many_", TORCH_BOX(&mask_apply_many_));
    m.impl("mask_pack", TORCH_BOX(&mask_pack));
    m.impl("mask_unpack", TORCH_BOX(&mask_unpack));
    m.impl("mask_n_of_m", TORCH_BOX(&mask_n_of_m));
    m.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram));
}

}  // namespace ds_compress::bindings
