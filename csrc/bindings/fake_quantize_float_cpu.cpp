// Fake quantization to small floats on the CPU. The blocks of a matrix lie one after the other, whatever row they are
// of: some are measured, then quantized while they are in the first cache.
#include <atomic>
#include <cstring>

#include "elementwise_cpu.h"

namespace ds_compress::bindings {
namespace {

// Bytes that are measured, then quantized: they, their results and those that are fetched meanwhile fit the first
// cache.
constexpr int64_t kAtATime = int64_t{1} << 13;
// A number of blocks that is whole vectors of scales.
constexpr int64_t kVectorsOfScales = 16;
// Elements up to which a block is worked on by one thread, and at which longer ones are cut; a multiple of 8.
constexpr int64_t kPiece = int64_t{1} << 15;

// One call: where its blocks lie and what their numbers are.
struct Call {
    const cpu::ElementwiseKernels& kernels;
    const uint8_t* x;
    uint8_t* y;
    uint8_t* mask;  // of what does not saturate, or null
    int64_t element_size;
    cpu::Float type;
    math::FloatFormat format;
    float global_scale;
    float* scales;  // one for each block, whether given or chosen
    bool given;

    void choose(int64_t first_block, int64_t blocks, int64_t block) const {
        kernels.float_scales(x + first_block * block * element_size, type, blocks, block, format, global_scale,
                             scales + first_block);
    }
    void quantize(int64_t first, int64_t blocks, int64_t block, const float* of_blocks) const {
        kernels.fake_quantize_float(x + first * element_size, y + first * element_size, type, blocks, block, of_blocks,
                                    !given, format, mask != nullptr ? mask + first / 8 : nullptr, first % 8);
    }
};

void raise_to(std::atomic<uint32_t>& largest, uint32_t value) {
    uint32_t before = largest.load();
    while (before < value && !largest.compare_exchange_weak(before, value)) {
    }
}

// A block that is longer than a piece: its pieces go to threads, once to measure and once to quantize.
void long_block(const Call& call, int64_t number, int64_t block) {
    const int64_t begin = number * block, end = begin + block;
    // Pieces begin at whole bytes of the mask, except the first.
    const int64_t first = begin / 8 * 8;
    const auto in_pieces = [&](const auto& run) {
        in_ranges(end - first, kPiece, [&](int64_t from, int64_t to) {
            const int64_t start = first + from < begin ? begin : first + from;
            run(start, first + to - start);
        });
    };
    if (!call.given) {
        std::atomic<uint32_t> largest{0};
        in_pieces([&](int64_t start, int64_t count) {
            const auto* piece = call.x + start * call.element_size;
            raise_to(largest, call.kernels.measure(piece, call.type, count, /*symmetric=*/true).largest_bits);
        });
        call.scales[number] = math::float_scale(largest.load(), call.format, call.global_scale);
    }
    in_pieces([&](int64_t start, int64_t count) { call.quantize(start, 1, count, call.scales + number); });
}

}  // namespace

void Cpu::fake_quantize_float(const Tensor& x, const std::optional<Tensor>& scale,
                              const std::optional<Tensor>& global_scale, const SmallFloat& number, int64_t block,
                              bool with_mask, const FakeQuantizedFloat& to) {
    // Results do not alias arguments.
    if (scale) memcpy(data<float>(to.scale), const_data<float>(*scale), 4 * static_cast<size_t>(scale->numel()));
    if (x.numel() == 0) return;
    if (scale && scale->numel() == 1) block = x.numel();  // one scale for all: one block
    const Call call{
        .kernels = cpu::elementwise(),
        .x = const_data<uint8_t>(x),
        .y = data<uint8_t>(to.y),
        .mask = with_mask ? data<uint8_t>(to.mask) : nullptr,
        .element_size = static_cast<int64_t>(x.element_size()),
        .type = float_of(x),
        .format = math::float_format(number.exponent_bits, number.mantissa_bits, number.largest, number.scale_kind),
        .global_scale = global_scale ? *const_data<float>(*global_scale) : 1.0f,
        .scales = data<float>(to.scale),
        .given = scale.has_value(),
    };
    const int64_t blocks = x.numel() / block;
    if (block > kPiece) {
        for (int64_t number = 0; number < blocks; number++) long_block(call, number, block);
        return;
    }
    const int64_t bytes = block * call.element_size;
    int64_t together = bytes < kAtATime ? kAtATime / bytes : 1;
    if (together > kVectorsOfScales) together = together / kVectorsOfScales * kVectorsOfScales;
    // A thread's blocks end at a whole byte of the mask.
    const int64_t step = with_mask && together * block % 8 != 0 ? 8 * together : together;
    const int64_t groups = (blocks + step - 1) / step;
    torch::stable::parallel_for(0, groups, kElementsPerThread / (step * block) + 1, [&](int64_t from, int64_t until) {
        const int64_t last = until * step < blocks ? until * step : blocks;
        for (int64_t first = from * step; first < last; first += together) {
            const int64_t count = last - first < together ? last - first : together;
            if (!call.given) call.choose(first, count, block);
            call.quantize(first * block, count, block, call.scales + first);
        }
    });
}

}  // namespace ds_compress::bindings
