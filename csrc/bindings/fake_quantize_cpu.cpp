// Fake quantization on the CPU: a row is measured and quantized while it is in cache.
#include "elementwise_cpu.h"

#include <cstring>
#include <mutex>

namespace ds_compress::bindings {
namespace {

// Elements up to which a row is worked on by one thread, and at which longer ones are cut; a multiple of 8.
constexpr int64_t kPiece = int64_t{1} << 15;

// One call: where its rows lie and what their range is.
struct Call {
    const cpu::ElementwiseKernels& kernels;
    const uint8_t* x;
    uint8_t* y;
    uint8_t* mask;  // of what is not clipped, or null
    int64_t columns;
    int64_t element_size;
    cpu::Float type;
    float quant_min, quant_max, steps;
    bool symmetric;

    cpu::Span measure(int64_t first, int64_t count) const {
        return kernels.measure(x + first * element_size, type, count, symmetric);
    }
    void quantize(int64_t first, int64_t count, math::ScaleAndOffset range) const {
        kernels.fake_quantize(x + first * element_size, y + first * element_size, type, count,
                              {range.scale, range.offset, !symmetric, quant_min, quant_max},
                              mask != nullptr ? mask + first / 8 : nullptr, first % 8);
    }
    math::ScaleAndOffset range_of(cpu::Span span) const {
        if (columns == 0) span = {0.0f, 0.0f, 0};
        if (symmetric) return {math::row_scale(span.largest_bits, steps), 0.0f};
        if (span.largest_bits >= math::kInfinityBits) span.lowest = span.highest = math::float_of(math::kNanBits);
        return math::row_range(span.lowest + 0.0f, span.highest, steps);  // either zero becomes +0.0
    }
};

cpu::Span joined(cpu::Span a, cpu::Span b) {
    return {a.lowest < b.lowest ? a.lowest : b.lowest, a.highest > b.highest ? a.highest : b.highest,
            a.largest_bits > b.largest_bits ? a.largest_bits : b.largest_bits};
}

// A row that is longer than a piece: its pieces go to threads, once to measure and once to quantize.
math::ScaleAndOffset long_row(const Call& call, int64_t row, const math::ScaleAndOffset* given) {
    const int64_t begin = row * call.columns, end = begin + call.columns;
    // Pieces begin at whole bytes of the mask, except the first.
    const int64_t first = begin / 8 * 8;
    const auto in_pieces = [&](const auto& run) {
        in_ranges(end - first, kPiece, [&](int64_t from, int64_t to) {
            const int64_t start = first + from < begin ? begin : first + from;
            run(start, first + to - start);
        });
    };
    math::ScaleAndOffset range;
    if (given != nullptr) {
        range = *given;
    } else {
        std::mutex mutex;
        cpu::Span total = call.measure(begin, 1);
        in_pieces([&](int64_t start, int64_t count) {
            const cpu::Span span = call.measure(start, count);
            const std::lock_guard<std::mutex> lock(mutex);
            total = joined(total, span);
        });
        range = call.range_of(total);
    }
    in_pieces([&](int64_t start, int64_t count) { call.quantize(start, count, range); });
    return range;
}

}  // namespace

void Cpu::fake_quantize(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& offset,
                        QuantRange range, bool with_mask, const FakeQuantized& to) {
    const int64_t rows = x.size(0), columns = x.size(1), ranges = to.scale.numel();
    const bool symmetric = range.symmetric;
    auto *scale_to = data<float>(to.scale), *offset_to = data<float>(to.offset);
    const auto *given_scale = const_data_or_null<float>(scale), *given_offset = const_data_or_null<float>(offset);
    // Results do not alias arguments.
    if (given_scale != nullptr) memcpy(scale_to, given_scale, 4 * static_cast<size_t>(ranges));
    if (given_offset != nullptr) memcpy(offset_to, given_offset, 4 * static_cast<size_t>(ranges));

    const Call call{
        .kernels = cpu::elementwise(),
        .x = const_data<uint8_t>(x),
        .y = data<uint8_t>(to.y),
        .mask = with_mask ? data<uint8_t>(to.mask) : nullptr,
        .columns = columns,
        .element_size = static_cast<int64_t>(x.element_size()),
        .type = float_of(x),
        .quant_min = static_cast<float>(range.quant_min),
        .quant_max = static_cast<float>(range.quant_max),
        .steps = static_cast<float>(range.steps),
        .symmetric = symmetric,
    };

    const auto given_range = [&](int64_t row) -> math::ScaleAndOffset {
        const int64_t index = ranges == 1 ? 0 : row;
        return {given_scale[index], given_offset != nullptr ? given_offset[index] : 0.0f};
    };
    const auto store_range = [&](int64_t row, math::ScaleAndOffset used) {
        scale_to[row] = used.scale;
        if (!symmetric) offset_to[row] = used.offset;
    };
    if (columns > kPiece) {
        for (int64_t row = 0; row < rows; row++) {
            const math::ScaleAndOffset given = scale ? given_range(row) : math::ScaleAndOffset{};
            const math::ScaleAndOffset used = long_row(call, row, scale ? &given : nullptr);
            if (!scale) store_range(row, used);
        }
        return;
    }
    // Eight rows together end at a whole byte of the mask.
    const int64_t height = with_mask && columns % 8 != 0 ? 8 : 1;
    const int64_t groups = (rows + height - 1) / height;
    const int64_t grain = kElementsPerThread / (height * (columns > 0 ? columns : 1)) + 1;
    torch::stable::parallel_for(0, groups, grain, [&](int64_t first, int64_t last) {
        for (int64_t row = first * height; row < last * height && row < rows; row++) {
            const auto used = scale ? given_range(row) : call.range_of(call.measure(row * columns, columns));
            if (!scale) store_range(row, used);
            call.quantize(row * columns, columns, used);
        }
    });
}

}  // namespace ds_compress::bindings
