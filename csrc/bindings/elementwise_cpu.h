// What the CPU bindings of the elementwise ops share.
#pragma once

#include "../cpu/elementwise/kernels.h"
#include "elementwise_checks.h"

namespace ds_compress::bindings {

inline cpu::Float float_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::BFloat16:
            return cpu::Float::bf16;
        case ScalarType::Half:
            return cpu::Float::fp16;
        case ScalarType::Double:
            return cpu::Float::fp64;
        default:
            return cpu::Float::fp32;
    }
}

template <class T>
T* data_of(const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
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
