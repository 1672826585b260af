// Sums of squares under a mask, on the CPU only: see ds_compress/ops/reference/squares.py.
#include <algorithm>
#include <vector>

#include "elementwise_cpu.h"

namespace ds_compress::bindings {
namespace {

constexpr int64_t kPart = 1 << 16;  // elements that are summed up in one go: the sum does not depend on the threads

Tensor mask_square_sums(const Tensor& values, const std::optional<Tensor>& packed) {
    const char* op = "mask_square_sums";
    check(op, "values", values, 1, {kFp32, kBf16, kFp16});
    const int64_t count = values.numel(), parts = (count + kPart - 1) / kPart;
    if (packed) {
        check_same_device(op, "packed", *packed, values);
        check_bits(op, *packed, count, 0);
    }
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const auto* from = static_cast<const uint8_t*>(values.const_data_ptr());
    const auto size = static_cast<int64_t>(values.element_size());
    std::vector<double> sums(static_cast<size_t>(2 * parts));
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t part = first; part < last; part++) {
            const int64_t begin = part * kPart;
            const cpu::Mask mask{const_data_or_null<uint8_t>(packed), packed ? packed->numel() : 0, begin};
            kernels.mask_square_sums(from + begin * size, float_of(values), std::min(kPart, count - begin), mask,
                                     sums.data() + 2 * part);
        }
    });
    const Tensor result = new_tensor(values, {2}, kFp64);
    double totals[2] = {0, 0};
    for (size_t i = 0; i < sums.size(); i++) totals[i % 2] += sums[i];
    std::copy_n(totals, 2, data<double>(result));
    return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CPU, m) { m.impl("mask_square_sums", TORCH_BOX(&mask_square_sums)); }

}  // namespace ds_compress::bindings
