// The int8 linear layer around a multiplication of one instruction set. To be included in its .cpp.
//
// An `Engine` has
//     kColumns, kRows, kDepth    columns of a panel, rows of a tile, what K is padded to
//     Codes                      see quantize.h; weights are brought to this form too before they are packed
//     panel_bytes(depth)         of one packed panel
//     pack(rows, stride, depth, corrections, panel)
//     multiply(codes, stride, rows, panel, depth, sums, workspace)    sums (rows, kColumns), not yet corrected by row
//     kWorkspaceBytes            what multiply may use, aligned to 64
#pragma once

#include "epilogue.h"
#include "ds_compress/packed.h"
#include "quantize.h"

namespace ds_compress::cpu {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;  // codes of a block of rows, to stay in the second-level cache
constexpr int64_t kBlockRows = 128;

// Row-major int8 as an input of `quantize_row`: with scale 1 a code is its own code.
struct Int8 {
    using Stored = int8_t;
    static DSC_INLINE Floats load(const int8_t* from) {
        using Bytes = int8_t __attribute__((vector_size(kLanes)));
        return __builtin_convertvector(__builtin_convertvector(load_as<Bytes>(from), Ints), Floats);
    }
};

template <class Engine>
struct Int8Driver {
    using Codes = typename Engine::Codes;
    using Stored = typename Codes::Stored;
    static constexpr int kColumns = Engine::kColumns;

    // One cache line more than whole strips, so that rows do not all fall into the same cache sets.
    static int64_t stride_of(int64_t columns) {
        return round_up(columns, 64) + 64 / static_cast<int64_t>(sizeof(Stored));
    }

    static int64_t block_rows(int64_t columns) {
        const int64_t fitting = kBlockBytes / (stride_of(columns) * static_cast<int64_t>(sizeof(Stored)));
        const int64_t bounded = fitting > kBlockRows ? kBlockRows : fitting;
        return bounded < Engine::kRows ? Engine::kRows : bounded / Engine::kRows * Engine::kRows;
    }

    struct Scratch {
        Stored* codes;
        float* scale;
        int32_t* correction;
        int32_t* sums;
        void* workspace;

        Scratch(void* memory, int64_t code_rows, int64_t columns) {
            auto* next = static_cast<uint8_t*>(memory);
            const auto take = [&](int64_t bytes) {
                auto* taken = next;
                next += round_up(bytes, 64);
                return taken;
            };
            workspace = take(Engine::kWorkspaceBytes);
            scale = reinterpret_cast<float*>(take(kBlockRows * 4));
            correction = reinterpret_cast<int32_t*>(take(kBlockRows * 4));
            sums = reinterpret_cast<int32_t*>(take(kBlockRows * kColumns * 4));
            codes = reinterpret_cast<Stored*>(take(code_rows * stride_of(columns) * sizeof(Stored)));
            bytes = next - static_cast<uint8_t*>(memory);
        }
        int64_t bytes;
    };

    static int64_t scratch_bytes(int64_t columns) {
        const int64_t rows = block_rows(columns);
        return Scratch(nullptr, rows > kColumns ? rows : kColumns, columns).bytes;
    }

    static void linear(const LinearCall& call, Range rows, Range panels, void* memory) {
        const int64_t columns = call.weight.columns;
        const int64_t block = block_rows(columns);
        const Scratch scratch(memory, block, columns);
        for (int64_t begin = rows.begin; begin < rows.end; begin += block) {
            const int64_t count = rows.end - begin < block ? rows.end - begin : block;
            with_format(call.x_type, [&]<class Format>() { quantize_block<Format>(call, begin, count, scratch); });
            for (int64_t panel = panels.begin; panel < panels.end; panel++)
                finish_panel(call, begin, count, panel, scratch);
        }
    }

    template <class Format>
    static void quantize_block(const LinearCall& call, int64_t begin, int64_t count, const Scratch& scratch) {
        const int64_t columns = call.weight.columns, stride = stride_of(columns);
        const auto* x = static_cast<const typename Format::Stored*>(call.x) + begin * columns;
        for (int64_t m = 0; m < count; m++, x += columns) {
            const RowScale scale = row_scale<Format>(x, columns, call.input_scale, call.steps);
            typename Codes::Correction correction;
            Stored* codes = scratch.codes + m * stride;
            if (scale.codes_are_zero) {
                zero_row<Codes>(columns, codes);
            } else if (call.input_scale != nullptr) {
                quantize_row<Codes, Format, true>(x, columns, scale.value, call.steps, codes, correction);
            } else {
                quantize_row<Codes, Format, false>(x, columns, scale.value, call.steps, codes, correction);
            }
            scratch.scale[m] = scale.value;
            scratch.correction[m] = correction.total();
        }
    }

    static void finish_panel(const LinearCall& call, int64_t begin, int64_t count, int64_t panel,
                             const Scratch& scratch) {
        const int64_t depth = round_up(call.weight.columns, Engine::kDepth);
        Engine::multiply(scratch.codes, stride_of(call.weight.columns), count,
                         call.weight.body + panel * Engine::panel_bytes(depth), depth, scratch.sums,
                         scratch.workspace);
        const int64_t first = panel * kColumns;
        const PanelColumns<kColumns> columns(call, first);
        with_format(call.y_type, [&]<class Format>() {
            auto* y = static_cast<typename Format::Stored*>(call.y) + begin * call.weight.rows + first;
            with_activation(call.activation, [&]<Activation kActivation>() {
                dequantize<Format, kActivation, kColumns>(scratch.sums, count, scratch.scale, scratch.correction,
                                                          columns, y, call.weight.rows);
            });
        });
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
                typename Codes::Correction correction;
                if (row < weight.rows)
                    quantize_row<Codes, Format, true>(values + row * weight.columns, weight.columns,
                                                      scale[scale_per_row ? row : 0], steps,
                                                      scratch.codes + j * stride, correction);
                else
                    zero_row<Codes>(weight.columns, scratch.codes + j * stride);
                corrections[j] = correction.total();
            }
            Engine::pack(scratch.codes, stride, depth, corrections, body + panel * Engine::panel_bytes(depth));
        }
    }

    static void pack(const int8_t* codes, const LinearWeight& weight, Range panels, void* memory, uint8_t* body) {
        const float one = 1.0f;
        pack_panels<Int8>(codes, &one, false, 128, weight, panels, memory, body);
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
