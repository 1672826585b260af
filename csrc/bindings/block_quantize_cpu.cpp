// Payloads of a quantized reduction on the CPU.
#include "elementwise_cpu.h"

#include <algorithm>

namespace ds_compress::bindings {
namespace {

cpu::BlockFormat layout_of(int64_t numel, PayloadFormat format) {
    return {format.bits, format.block, blocks_of(numel, format.block)};
}

// Runs of blocks of one payload, in threads.
template <class Run>
void in_blocks(const cpu::BlockFormat& layout, const Run& run) {
    torch::stable::parallel_for(0, layout.blocks, kElementsPerThread / layout.block, run);
}

cpu::Payloads summands(const Tensor& payloads, float multiplier) {
    return {const_data<uint8_t>(payloads), payloads.size(0), multiplier};
}

}  // namespace

void Cpu::block_quantize(const Tensor& x, const Tensor& payloads, const std::optional<Tensor>& residual, int64_t chunk,
                         PayloadFormat format) {
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const cpu::BlockFormat layout = layout_of(chunk, format);
    const auto* values = const_data<uint8_t>(x);
    const auto size = static_cast<int64_t>(x.element_size());
    auto* rest = data_or_null<float>(residual);
    for (int64_t w = 0; w < payloads.size(0); w++) {
        auto* payload = data<uint8_t>(payloads) + w * layout.payload_bytes();
        const int64_t end = std::min((w + 1) * chunk, x.numel());
        in_blocks(layout, [&](int64_t first, int64_t last) {
            const int64_t begin = std::min(w * chunk + first * layout.block, end);
            kernels.block_quantize(values + begin * size, float_of(x), end - begin,
                                   rest != nullptr ? rest + begin : nullptr, payload, layout, first, last);
        });
    }
}

void Cpu::block_dequantize(const Tensor& payloads, const Tensor& out, int64_t chunk, PayloadFormat format) {
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const cpu::BlockFormat layout = layout_of(chunk, format);
    auto* values = data<uint8_t>(out);
    const auto size = static_cast<int64_t>(out.element_size());
    for (int64_t w = 0; w < payloads.size(0); w++) {
        const auto* payload = const_data<uint8_t>(payloads) + w * layout.payload_bytes();
        const int64_t end = std::min((w + 1) * chunk, out.numel());
        in_blocks(layout, [&](int64_t first, int64_t last) {
            const int64_t begin = std::min(w * chunk + first * layout.block, end);
            kernels.block_dequantize(payload, layout, first, last, values + begin * size, float_of(out), end - begin);
        });
    }
}

void Cpu::block_reduce(const Tensor& payloads, const Tensor& out, PayloadFormat format, float multiplier) {
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const cpu::BlockFormat layout = layout_of(out.numel(), format);
    auto* to = data<float>(out);
    in_blocks(layout, [&](int64_t first, int64_t last) {
        const int64_t begin = first * layout.block;
        kernels.block_reduce(summands(payloads, multiplier), layout, first, last, to + begin, out.numel() - begin);
    });
}

void Cpu::block_reduce_quantize(const Tensor& payloads, const Tensor& payload, const std::optional<Tensor>& residual,
                                int64_t numel, PayloadFormat format, float multiplier) {
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const cpu::BlockFormat layout = layout_of(numel, format);
    auto* rest = data_or_null<float>(residual);
    auto* to = data<uint8_t>(payload);
    in_blocks(layout, [&](int64_t first, int64_t last) {
        const int64_t begin = first * layout.block;
        kernels.block_reduce_quantize(summands(payloads, multiplier), layout, first, last, numel - begin,
                                      rest != nullptr ? rest + begin : nullptr, to);
    });
}

}  // namespace ds_compress::bindings
