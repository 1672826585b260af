// The int4 linear layer around a multiplication of one instruction set. To be included in its .cpp.
//
// An `Engine` has kColumns and kRows as in int8_driver.h, Values (int8), and
//     multiply(rows, tile)       fills `values` of a tile of up to kRows rows
// A panel is the scales, (groups, kColumns) fp32, then for every 8 columns of K, up to a multiple of 32, 4 bytes for
// each column of the panel: the first four in the low nibbles, the others in the high ones.
// A quantized value q is stored as q + 8 so that unpacking needs no sign; 8 times the sum of a row is taken off again.
#pragma once

#include "epilogue.h"
#include "quantize.h"
#include "scratch.h"

namespace ds_compress::cpu {
namespace {

constexpr int64_t kInt4Depth = 32;  // columns of K that are multiplied at a time; groups are multiples of it
constexpr int64_t kInt4BlockRows = 64;

struct Int4Tile {
    const int8_t* quantized;  // rows `stride` apart
    int64_t stride;
    const float* scales;       // (groups, kColumns)
    const uint8_t* weights;    // blocks
    int64_t blocks;            // of 32 columns of K
    int64_t blocks_per_group;  // the last group may have fewer
    const int32_t* excess;     // 8 times the sum of a group's quantized values; rows `groups` apart
    int64_t groups;
    int32_t* partial;  // (kRows, kColumns), for sums of groups of more than one block
    float* values;     // (kRows, kColumns), the result
};

template <class Engine>
struct Int4Driver {
    static constexpr int kColumns = Engine::kColumns;
    using Finish = decltype(rescale<Fp32, Activation::none, kColumns>);
    static constexpr int64_t kBlockBytes = kInt4Depth * kColumns / 2;

    static int64_t stride_of(int64_t columns) { return round_up(columns, 64) + 64; }
    static int64_t blocks_of(int64_t columns) { return (columns + kInt4Depth - 1) / kInt4Depth; }
    static int64_t panel_bytes(const LinearWeight& weight) {
        return 4 * weight.groups * kColumns + blocks_of(weight.columns) * kBlockBytes;
    }

    struct Scratch {
        int8_t* quantized;
        float* scale;
        int32_t* excess;
        int32_t* partial;
        float* values;
        int64_t bytes;

        Scratch(void* memory, int64_t columns, int64_t groups) {
            ScratchArrays arrays(memory);
            scale = arrays.take<float>(kInt4BlockRows);
            partial = arrays.take<int32_t>(Engine::kRows * kColumns);
            values = arrays.take<float>(Engine::kRows * kColumns);
            excess = arrays.take<int32_t>(kInt4BlockRows * groups);
            quantized = arrays.take<int8_t>(kInt4BlockRows * stride_of(columns));
            bytes = arrays.bytes();
        }
    };

    static void linear(const LinearCall& call, Range rows, Range panels, void* memory) {
        const Scratch scratch(memory, call.weight.columns, call.weight.groups);
        Finish* finish_tile = nullptr;
        with_format(call.y_type, [&]<class Format>() {
            with_activation(call.activation,
                            [&]<Activation kActivation>() { finish_tile = rescale<Format, kActivation, kColumns>; });
        });
        for (int64_t begin = rows.begin; begin < rows.end; begin += kInt4BlockRows) {
            const int64_t count = rows.end - begin < kInt4BlockRows ? rows.end - begin : kInt4BlockRows;
            with_format(call.x_type, [&]<class Format>() { quantize_block<Format>(call, begin, count, scratch); });
            for (int64_t panel = panels.begin; panel < panels.end; panel++)
                compute_panel(call, begin, count, panel, scratch, finish_tile);
        }
    }

    template <class Format>
    static void quantize_block(const LinearCall& call, int64_t begin, int64_t count, const Scratch& scratch) {
        const LinearWeight& weight = call.weight;
        const int64_t stride = stride_of(weight.columns), depth = kInt4Depth * blocks_of(weight.columns);
        const auto* x = static_cast<const typename Format::Stored*>(call.x) + begin * weight.columns;
        for (int64_t m = 0; m < count; m++, x += weight.columns) {
            int8_t* quantized = scratch.quantized + m * stride;
            memset(quantized + depth - kInt4Depth, 0, depth > 0 ? kInt4Depth : 0);
            const RowScale scale = row_scale<Format>(x, weight.columns, call.input_scale, call.steps);
            typename Engine::Values::Correction none;
            if (scale.all_zero)
                zero_row<typename Engine::Values>(weight.columns, quantized);
            else
                quantize_row<typename Engine::Values, Format, true>(x, weight.columns, scale.value, call.steps,
                                                                    quantized, none);
            scratch.scale[m] = scale.value;
            for (int64_t group = 0; group < weight.groups; group++) {
                const int64_t first = group * weight.group_size;
                const int64_t end =
                    first + weight.group_size < weight.columns ? first + weight.group_size : weight.columns;
                int32_t sum = 0;
                for (int64_t k = first; k < end; k++) sum += quantized[k];
                scratch.excess[m * weight.groups + group] = 8 * sum;
            }
        }
    }

    static void compute_panel(const LinearCall& call, int64_t begin, int64_t count, int64_t panel,
                              const Scratch& scratch, Finish* finish_tile) {
        const LinearWeight& weight = call.weight;
        const int64_t stride = stride_of(weight.columns);
        const uint8_t* packed = weight.body + panel * panel_bytes(weight);
        const PanelColumns<kColumns> columns(call, panel * kColumns);
        for (int64_t m = 0; m < count; m += Engine::kRows) {
            const int64_t rows = count - m < Engine::kRows ? count - m : Engine::kRows;
            const Rectangle y{call, begin + m, rows, panel * kColumns, columns.count};
            y.prefetch();
            if (weight.groups == 0)
                memset(scratch.values, 0, rows * kColumns * sizeof(float));
            else
                Engine::multiply(
                    rows, Int4Tile{scratch.quantized + m * stride, stride, reinterpret_cast<const float*>(packed),
                                   packed + 4 * weight.groups * kColumns, blocks_of(weight.columns),
                                   weight.group_size / kInt4Depth, scratch.excess + m * weight.groups, weight.groups,
                                   scratch.partial, scratch.values});
            finish_tile(scratch.values, scratch.scale + m, columns, y);
        }
    }

    static void pack(const int8_t* quantized, const float* scale, const LinearWeight& weight, Range panels,
                     uint8_t* body) {
        const int64_t blocks = blocks_of(weight.columns);
        for (int64_t panel = panels.begin; panel < panels.end; panel++) {
            uint8_t* to = body + panel * panel_bytes(weight);
            uint8_t* nibbles = to + 4 * weight.groups * kColumns;
            memset(nibbles, 0x88, blocks * kBlockBytes);  // padding is 0
            for (int column = 0; column < kColumns; column++) {
                const int64_t row = panel * kColumns + column;
                const bool exists = row < weight.rows;
                for (int64_t group = 0; group < weight.groups; group++) {
                    const float value = exists ? scale[row * weight.groups + group] : 0.0f;
                    memcpy(to + 4 * (group * kColumns + column), &value, 4);
                }
                for (int64_t k = 0; exists && k < weight.columns; k++) {
                    uint8_t& byte = nibbles[byte_of(column, k)];
                    const auto q = static_cast<uint8_t>(quantized[row * weight.columns + k] + 8);
                    byte = k % 8 < 4 ? (byte & 0xf0) | q : (byte & 0x0f) | q << 4;
                }
            }
        }
    }

    static int64_t byte_of(int64_t column, int64_t k) { return (k / 8 * kColumns + column) * 4 + k % 4; }

    static int64_t scratch_bytes(int64_t columns, int64_t groups) { return Scratch(nullptr, columns, groups).bytes; }
};

}  // namespace
}  // namespace ds_compress::cpu
