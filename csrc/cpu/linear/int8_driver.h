// The int8 linear layer around a multiplication of one instruction set. To be included in its .cpp.
//
// An `Engine` has
//     kColumns, kRows, kDepth    columns of a panel, rows of a tile, what K is padded to
//     kChunk                     columns of K of which a panel stays in the cache that tiles read it from
//     kPrefetchParts             tiles that together prefetch as many weights as each of them reads
//     kAheadBytes                how far ahead few rows (one tile) prefetch their own weights
//     Session                    what a call needs of the processor while it multiplies
//     Values                      see quantize.h; weights are brought to this form too before they are packed
//     panel_bytes(depth)         of one packed panel: kColumns int32 that sums start from, then the weights
//     pack(rows, stride, depth, corrections, panel)
//     tile(rows, quantized, stride, weights, depth, next, from, from_stride, to)
//                                up to kRows rows of sums, from `from` to `to` (kColumns apart), not corrected by row;
//                                may prefetch what lies at `next` (which may be behind the end of all memory)
//
// Loops, from the outside: blocks of rows, quantized once; slices of panels; chunks of K; panels; tiles. So a chunk of
// the block's quantized values stays in the second-level cache. With one chunk, a slice has one panel, and with few
// rows (decode) there is one chunk: each weight is then read once, in the order of memory. A tile is finished as soon
// as its sums are complete, while they are in the first-level cache: the processor writes results while it multiplies
// the next tile.
#pragma once

#include "epilogue.h"
#include "quantize.h"
#include "scratch.h"

namespace ds_compress::cpu {
namespace {

constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockBytes = 8 << 20;  // quantized values of a block, where K is huge
constexpr int64_t kScaleRows = 4;
constexpr int64_t kSliceColumns = 256;

struct NoSession {};

// Row-major int8 as an input of `quantize_row`: with scale 1 a value is its own quantization.
struct Int8 {
    using Stored = int8_t;
    static DSC_INLINE Floats load(const int8_t* from) {
        using Bytes = int8_t __attribute__((vector_size(kLanes)));
        return __builtin_convertvector(__builtin_convertvector(load_as<Bytes>(from), Ints), Floats);
    }
};

template <class Engine>
struct Int8Driver {
    static_assert(kBlockRows % Engine::kRows == 0);
    using Values = typename Engine::Values;
    using Stored = typename Values::Stored;
    static constexpr int kColumns = Engine::kColumns;
    using Finish = decltype(dequantize<Fp32, Activation::none, kColumns>);

    // One cache line more than whole strips, so that rows do not all fall into the same cache sets.
    static int64_t stride_of(int64_t columns) {
        return round_up(columns, 64) + 64 / static_cast<int64_t>(sizeof(Stored));
    }

    static int64_t panel_bytes(const LinearWeight& weight) {
        return Engine::panel_bytes(round_up(weight.columns, Engine::kDepth));
    }

    static int64_t block_rows(int64_t columns) {
        const int64_t fitting = kBlockBytes / (stride_of(columns) * static_cast<int64_t>(sizeof(Stored)));
        const int64_t bounded = fitting > kBlockRows ? kBlockRows : fitting;
        return bounded < Engine::kRows ? Engine::kRows : bounded / Engine::kRows * Engine::kRows;
    }

    struct Scratch {
        float* scale;
        int32_t* correction;
        int32_t* sums;
        Stored* quantized;
        int64_t bytes;

        Scratch(void* memory, int64_t x_rows, int64_t columns) {
            ScratchArrays arrays(memory);
            scale = arrays.take<float>(kBlockRows);
            correction = arrays.take<int32_t>(kBlockRows);
            sums = arrays.take<int32_t>(kBlockRows * kSliceColumns);
            quantized = arrays.take<Stored>(x_rows * stride_of(columns));
            bytes = arrays.bytes();
        }
    };

    static int64_t scratch_bytes(int64_t columns) {
        const int64_t rows = block_rows(columns);
        return Scratch(nullptr, rows > kColumns ? rows : kColumns, columns).bytes;
    }

    static void linear(const LinearCall& call, Range rows, Range panels, void* memory) {
        [[maybe_unused]] const typename Engine::Session session;
        const int64_t columns = call.weight.columns;
        const int64_t block = block_rows(columns);
        const Scratch scratch(memory, block, columns);
        Finish* finish_tile = nullptr;
        with_format(call.y_type, [&]<class Format>() {
            with_activation(call.activation,
                            [&]<Activation kActivation>() { finish_tile = dequantize<Format, kActivation, kColumns>; });
        });
        for (int64_t begin = rows.begin; begin < rows.end; begin += block) {
            const Range part{begin, rows.end - begin < block ? rows.end : begin + block};
            with_format(call.x_type, [&]<class Format>() { quantize_block<Format>(call, part, scratch); });
            const int64_t depth = round_up(columns, Engine::kDepth);
            const bool whole = part.end - part.begin <= Engine::kRows || depth <= Engine::kChunk;
            const int64_t chunks = whole ? 1 : (depth + Engine::kChunk - 1) / Engine::kChunk;
            const int64_t slice = whole ? 1 : kSliceColumns / kColumns;
            for (int64_t panel = panels.begin; panel < panels.end; panel += slice)
                compute_slice(call, part, {panel, panel + slice < panels.end ? panel + slice : panels.end}, depth,
                              round_up((depth + chunks - 1) / chunks, Engine::kDepth), scratch, finish_tile);
        }
    }

    template <class Format>
    static void quantize_block(const LinearCall& call, Range rows, const Scratch& scratch) {
        const int64_t columns = call.weight.columns, count = rows.end - rows.begin;
        const auto* x = static_cast<const typename Format::Stored*>(call.x) + rows.begin * columns;
        RowScale scales[kScaleRows];
        for (int64_t m = 0; m < count; m++, x += columns) {
            // A few scales at once: the last steps of one, which wait for each other, hide behind the next row.
            if (m % kScaleRows == 0)
                for (int64_t i = 0; i < kScaleRows && m + i < count; i++)
                    scales[i] = row_scale<Format>(x + i * columns, columns, call.input_scale, call.steps);
            const RowScale scale = scales[m % kScaleRows];
            typename Values::Correction correction;
            Stored* quantized = scratch.quantized + m * stride_of(columns);
            if (scale.all_zero) {
                zero_row<Values>(columns, quantized);
            } else if (call.input_scale != nullptr) {
                quantize_row<Values, Format, true>(x, columns, scale.value, call.steps, quantized, correction);
            } else {
                quantize_row<Values, Format, false>(x, columns, scale.value, call.steps, quantized, correction);
            }
            scratch.scale[m] = scale.value;
            scratch.correction[m] = correction.total();
        }
    }

    static void compute_slice(const LinearCall& call, Range rows, Range panels, int64_t depth, int64_t chunk,
                              const Scratch& scratch, Finish* finish_tile) {
        const int64_t count = rows.end - rows.begin, stride = stride_of(call.weight.columns);
        int64_t k = 0;
        do {  // once even if K is 0
            const int64_t part = depth - k < chunk ? depth - k : chunk;
            const bool last = k + part == depth;
            for (int64_t panel = panels.begin; panel < panels.end; panel++) {
                const uint8_t* packed = call.weight.body + panel * Engine::panel_bytes(depth);
                const uint8_t* weights = packed + (4 + k) * kColumns;
                int32_t* sums = scratch.sums + (panel - panels.begin) * count * kColumns;
                const PanelColumns<kColumns> columns(call, panel * kColumns);
                for (int64_t m = 0; m < count; m += Engine::kRows) {
                    const int64_t tile_rows = count - m < Engine::kRows ? count - m : Engine::kRows;
                    const Rectangle y{call, rows.begin + m, tile_rows, panel * kColumns, columns.count};
                    if (last) y.prefetch();
                    int32_t* to = sums + m * kColumns;
                    const auto* from = k == 0 ? reinterpret_cast<const int32_t*>(packed) : to;
                    const int64_t prefetched = m / Engine::kRows % Engine::kPrefetchParts;
                    const int64_t ahead =
                        Engine::panel_bytes(depth) + prefetched * part * kColumns / Engine::kPrefetchParts;
                    Engine::tile(tile_rows, scratch.quantized + m * stride + k, stride, weights, part,
                                 weights + (count > Engine::kRows ? ahead : Engine::kAheadBytes), from,
                                 k == 0 ? 0 : kColumns, to);
                    if (last) finish_tile(to, scratch.scale + m, scratch.correction + m, columns, y);
                }
            }
            k += part;
        } while (k < depth);
    }

    template <class Format>
    static void pack_panels(const typename Format::Stored* values, const float* scale, bool scale_per_row, int steps,
                            const LinearWeight& weight, Range panels, void* memory, uint8_t* body) {
        const Scratch scratch(memory, kColumns, weight.columns);
        const int64_t depth = round_up(weight.columns, Engine::kDepth), stride = stride_of(weight.columns);
        int32_t corrections[kColumns];
        for (int64_t panel = panels.begin; panel < panels.end; panel++) {
            for (int j = 0; j < kColumns; j++) {
                const int64_t row = panel * kColumns + j;
                typename Values::Correction correction;
                if (row < weight.rows)
                    quantize_row<Values, Format, true>(values + row * weight.columns, weight.columns,
                                                       scale[scale_per_row ? row : 0], steps,
                                                       scratch.quantized + j * stride, correction);
                else
                    zero_row<Values>(weight.columns, scratch.quantized + j * stride);
                corrections[j] = correction.total();
            }
            Engine::pack(scratch.quantized, stride, depth, corrections, body + panel * Engine::panel_bytes(depth));
        }
    }

    static void pack(const int8_t* quantized, const LinearWeight& weight, Range panels, void* memory, uint8_t* body) {
        const float one = 1.0f;
        pack_panels<Int8>(quantized, &one, false, 128, weight, panels, memory, body);
    }

    static void quantize_pack(const void* values, LinearType type, const float* scale, bool scale_per_row, int steps,
                              const LinearWeight& weight, Range panels, void* memory, uint8_t* body) {
        with_format(type, [&]<class Format>() {
            pack_panels<Format>(static_cast<const typename Format::Stored*>(values), scale, scale_per_row, steps,
                                weight, panels, memory, body);
        });
    }
};

}  // namespace
}  // namespace ds_compress::cpu
