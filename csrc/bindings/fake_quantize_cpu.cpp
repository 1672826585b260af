// Fake quantization on the CPU: a row is measured and quantized while it is in cache.
#include "ds_compress/math.h"
#include "elementwise_cpu.h"

#include <cstring>
#include <mutex>
#include <tuple>

namespace ds_compress::bindings {
namespace {

// Elements up to which a row is worked on by one thread, and at which longer ones are cut; a multiple of 8.
constexpr int64_t kPiece = int64_t{1} << 15;

// One call: where its rows lie and what their range is.
struct Call {
    const cpu::ElementwiseKernels& kernels;
    const uint8_t* x;
    uint8_t* y;
    uint8_t* kept;  // or null
    int64_t columns;
    int64_t element_size;
    cpu::Float type;
    float low, high, steps;
    bool symmetric;

    cpu::Span measure(int64_t first, int64_t count) const {
        return kernels.measure(x + first * element_size, type, count, symmetric);
    }
    void quantize(int64_t first, int64_t count, math::ScaleAndOffset range) const {
        kernels.fake_quantize(x + first * element_size, y + first * element_size, type, count,
                              {range.scale, range.offset, !symmetric, low, high},
                              kept != nullptr ? kept + first / 8 : nullptr, first % 8);
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
    // Pieces begin at whole bytes of the kept bits, except the first.
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

std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quantize(const Tensor& x, const std::optional<Tensor>& scale,
                                                         const std::optional<Tensor>& offset, int64_t low,
                                                         int64_t high, int64_t steps, bool symmetric, bool keep) {
    check_fake_quantize(x, scale, offset, low, high, steps, symmetric);
    const int64_t rows = x.size(0), columns = x.size(1);
    const int64_t ranges = scale ? scale->numel() : rows;
    Tensor y = torch::stable::empty_like(x);
    Tensor scales = torch::stable::new_empty(x, {ranges}, ScalarType::Float);
    Tensor offsets = torch::stable::new_empty(x, {symmetric ? 0 : ranges}, ScalarType::Float);
    Tensor kept = torch::stable::new_empty(x, {keep ? (rows * columns + 7) / 8 : 0}, ScalarType::Byte);
    auto* scale_to = static_cast<float*>(scales.data_ptr());
    auto* offset_to = static_cast<float*>(offsets.data_ptr());
    const auto* given_scale = data_of<const float>(scale);
    const auto* given_offset = data_of<const float>(offset);
    if (given_scale != nullptr) memcpy(scale_to, given_scale, 4 * static_cast<size_t>(ranges));
    if (given_offset != nullptr) memcpy(offset_to, given_offset, 4 * static_cast<size_t>(ranges));

    const Call call{
        .kernels = cpu::elementwise(),
        .x = static_cast<const uint8_t*>(x.data_ptr()),
        .y = static_cast<uint8_t*>(y.data_ptr()),
        .kept = keep ? static_cast<uint8_t*>(kept.data_ptr()) : nullptr,
        .columns = columns,
        .element_size = static_cast<int64_t>(x.element_size()),
        .type = float_of(x),
        .low = static_cast<float>(low),
        .high = static_cast<float>(high),
        .steps = static_cast<float>(steps),
        .symmetric = symmetric,
    };

    const auto given_range = [&](int64_t row) -> math::ScaleAndOffset {
        const int64_t index = ranges == 1 ? 0 : row;
        return {given_scale[index], given_offset != nullptr ? given_offset[index] : 0.0f};
    };
    const auto keep_range = [&](int64_t row, math::ScaleAndOffset range) {
        scale_to[row] = range.scale;
        if (!symmetric) offset_to[row] = range.offset;
    };
    if (columns > kPiece) {
        for (int64_t row = 0; row < rows; row++) {
            const math::ScaleAndOffset given = scale ? given_range(row) : math::ScaleAndOffset{};
            const math::ScaleAndOffset range = long_row(call, row, scale ? &given : nullptr);
            if (!scale) keep_range(row, range);
        }
        return {y, scales, offsets, kept};
    }
    // Eight rows together end at a whole byte of the kept bits.
    const int64_t height = keep && columns % 8 != 0 ? 8 : 1;
    const int64_t groups = (rows + height - 1) / height;
    const int64_t grain = kElementsPerThread / (height * (columns > 0 ? columns : 1)) + 1;
    torch::stable::parallel_for(0, groups, grain, [&](int64_t first, int64_t last) {
        for (int64_t row = first * height; row < last * height && row < rows; row++) {
            const auto range = scale ? given_range(row) : call.range_of(call.measure(row * columns, columns));
            if (!scale) keep_range(row, range);
            call.quantize(row * columns, columns, range);
        }
    });
    return {y, scales, offsets, kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CPU, m) { m.impl("fake_quantize", TORCH_BOX(&fake_quantize)); }

}  // namespace ds_compress::bindings
