// Masks and N:M selection on the CPU.
#include "elementwise_cpu.h"

namespace ds_compress::bindings {
namespace {

constexpr int64_t kMaskStep = 4096;  // elements: whole bytes of the mask and whole vectors of any dtype

cpu::Mask mask_of(const Tensor& packed, int64_t bit) { return {const_data<uint8_t>(packed), packed.numel(), bit}; }

cpu::Mask from(cpu::Mask mask, int64_t element) { return {mask.packed, mask.bytes, mask.bit + element}; }

uint8_t* at(const Tensor& tensor, int64_t element) {
    return data<uint8_t>(tensor) + element * static_cast<int64_t>(tensor.element_size());
}

}  // namespace

void Cpu::mask_apply(const Tensor& weights, const Tensor& packed, int64_t bit_offset, uint64_t fill) {
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const auto size = static_cast<int>(weights.element_size());
    const cpu::Mask mask = mask_of(packed, bit_offset);
    in_ranges(weights.numel(), kMaskStep, [&](int64_t begin, int64_t end) {
        kernels.mask_apply(at(weights, begin), size, end - begin, from(mask, begin), fill);
    });
}

void Cpu::mask_apply_many(const std::vector<Tensor>& weights, const std::vector<Tensor>& packed,
                          const std::vector<int64_t>& bit_offsets, double fill) {
    for (size_t i = 0; i < weights.size(); i++)
        mask_apply(weights[i], packed[i], bit_offsets[i], pattern_of(fill, weights[i].scalar_type()));
}

void Cpu::mask_pack(const Tensor& mask, const Tensor& packed) {
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    auto* to = data<uint8_t>(packed);
    in_ranges(mask.numel(), kMaskStep,
              [&](int64_t begin, int64_t end) { kernels.mask_pack(at(mask, begin), end - begin, to + begin / 8); });
}

void Cpu::mask_unpack(const Tensor& packed, int64_t bit_offset, const Tensor& to) {
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const cpu::Mask mask = mask_of(packed, bit_offset);
    in_ranges(to.numel(), kMaskStep,
              [&](int64_t begin, int64_t end) { kernels.mask_unpack(from(mask, begin), end - begin, at(to, begin)); });
}

void Cpu::mask_n_of_m(const Tensor& scores, int64_t n, int64_t m, const Tensor& packed) {
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const int64_t columns = scores.size(1), count = scores.numel();
    const auto* values = const_data<float>(scores);
    auto* to = data<uint8_t>(packed);
    const auto run = [&](int64_t first, int64_t height, int64_t width) {
        kernels.mask_n_of_m(values + first, height, width, static_cast<int>(n), static_cast<int>(m), to + first / 8);
    };
    if (columns % m == 0) {  // no run is short: rows do not matter, and a range is whole runs and whole bytes
        in_ranges(count, m * 64, [&](int64_t begin, int64_t end) { run(begin, 1, end - begin); });
    } else {
        in_ranges(count, columns * 8,
                  [&](int64_t begin, int64_t end) { run(begin, (end - begin) / columns, columns); });
    }
}

}  // namespace ds_compress::bindings
