// Messages of a quantized reduction on the CPU.
#include "elementwise_cpu.h"

namespace ds_compress::bindings {
namespace {

constexpr ScalarType kFp32 = ScalarType::Float, kBf16 = ScalarType::BFloat16, kFp16 = ScalarType::Half;

cpu::BlockFormat format_of(int64_t numel, int64_t bits, int64_t block) {
    return {static_cast<int>(bits), static_cast<int>(block), blocks_of(numel, block)};
}

// Runs of blocks of one message, in threads.
template <class Run>
void in_blocks(const cpu::BlockFormat& format, const Run& run) {
    torch::stable::parallel_for(0, format.blocks, kElementsPerThread / format.block, run);
}

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

void block_quantize(const Tensor& x, const Tensor& messages, const std::optional<Tensor>& residual, int64_t chunk,
                    int64_t bits, int64_t block) {
    const char* op = "block_quantize";
    check_format(op, bits, block);
    check(op, "x", x, 1, {kFp32, kBf16, kFp16});
    check_messages(op, messages, x.numel(), chunk, bits, block);
    check_same_device(op, "messages", messages, x);
    check_residual(op, residual, x.numel(), x);
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const cpu::BlockFormat format = format_of(chunk, bits, block);
    const auto* values = static_cast<const uint8_t*>(x.data_ptr());
    const auto size = static_cast<int64_t>(x.element_size());
    auto* rest = data_of<float>(residual);
    for (int64_t w = 0; w < messages.size(0); w++) {
        auto* message = static_cast<uint8_t*>(messages.data_ptr()) + w * format.message_bytes();
        const int64_t end = at_most((w + 1) * chunk, x.numel());
        in_blocks(format, [&](int64_t first, int64_t last) {
            const int64_t begin = at_most(w * chunk + first * block, end);
            kernels.block_quantize(values + begin * size, float_of(x), end - begin,
                                              rest != nullptr ? rest + begin : nullptr, message, format, first, last);
        });
    }
}

void block_dequantize(const Tensor& messages, const Tensor& out, int64_t chunk, int64_t bits, int64_t block) {
    const char* op = "block_dequantize";
    check_format(op, bits, block);
    check(op, "out", out, 1, {kFp32, kBf16, kFp16});
    check_messages(op, messages, out.numel(), chunk, bits, block);
    check_same_device(op, "messages", messages, out);
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const cpu::BlockFormat format = format_of(chunk, bits, block);
    auto* values = static_cast<uint8_t*>(out.data_ptr());
    const auto size = static_cast<int64_t>(out.element_size());
    for (int64_t w = 0; w < messages.size(0); w++) {
        const auto* message = static_cast<const uint8_t*>(messages.data_ptr()) + w * format.message_bytes();
        const int64_t end = at_most((w + 1) * chunk, out.numel());
        in_blocks(format, [&](int64_t first, int64_t last) {
            const int64_t begin = at_most(w * chunk + first * block, end);
            kernels.block_dequantize(message, format, first, last, values + begin * size, float_of(out),
                                                end - begin);
        });
    }
}

cpu::Messages summands(const Tensor& messages, double multiplier) {
    return {static_cast<const uint8_t*>(messages.data_ptr()), messages.size(0), static_cast<float>(multiplier)};
}

void block_reduce(const Tensor& messages, const Tensor& out, int64_t bits, int64_t block, double multiplier) {
    const char* op = "block_reduce";
    check_format(op, bits, block);
    check(op, "out", out, 1, {kFp32});
    check_summands(op, messages, out.numel(), bits, block);
    check_same_device(op, "messages", messages, out);
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const cpu::BlockFormat format = format_of(out.numel(), bits, block);
    auto* to = static_cast<float*>(out.data_ptr());
    in_blocks(format, [&](int64_t first, int64_t last) {
        kernels.block_reduce(summands(messages, multiplier), format, first, last, to + first * block,
                                        out.numel() - first * block);
    });
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
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    const cpu::BlockFormat format = format_of(numel, bits, block);
    auto* rest = data_of<float>(residual);
    auto* to = static_cast<uint8_t*>(message.data_ptr());
    in_blocks(format, [&](int64_t first, int64_t last) {
        const int64_t begin = first * block;
        kernels.block_reduce_quantize(summands(messages, multiplier), format, first, last, numel - begin,
                                                 rest != nullptr ? rest + begin : nullptr, to);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CPU, m) {
    m.impl("block_quantize", TORCH_BOX(&block_quantize));
    m.impl("block_dequantize", TORCH_BOX(&block_dequantize));
    m.impl("block_reduce", TORCH_BOX(&block_reduce));
    m.impl("block_reduce_quantize", TORCH_BOX(&block_reduce_quantize));
}

}  // namespace ds_compress::bindings
