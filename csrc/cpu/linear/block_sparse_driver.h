// The block-sparse int8 linear layer around a multiplication of one instruction set. To be included in its .cpp.
//
// An `Engine` has Values (see quantize.h) and kRows (rows of a tile), and
//     start(corrections, column)   what the sum of an output starts from
//     tile(rows, quantized, stride, part, sums)
//                                  adds to up to kRows rows of sums (48 apart) what a chunk's blocks of a strip give
//
// Loops, from the outside: blocks of rows, quantized once; strips; chunks of K; tiles; groups of 4 outputs. So a
// strip's weights stay in the second-level cache, and a tile's part of x in the first, while 12 groups read it.
#pragma once

#include "block_sparse.h"
#include "int8_driver.h"

namespace ds_compress::cpu {
namespace {

// The blocks of a strip in one chunk.
struct StripPart {
    int64_t begin;        // the first block
    const int32_t* ends;  // of kStripGroups groups
    const uint16_t* inputs;
    const int8_t* values;
};

template <class Engine>
struct BlockSparseDriver {
    static constexpr int kColumns = kStripOutputs;

    // What quantizes rows is the dense driver; it takes no more of an engine than this.
    struct Quantizing {
        using Values = typename Engine::Values;
        static constexpr int kColumns = kStripOutputs;
        static constexpr int kRows = Engine::kRows;
    };
    using Quantizer = Int8Driver<Quantizing>;
    using Finish = typename Quantizer::Finish;

    struct Scratch : Quantizer::Scratch {
        Scratch(void* memory, int64_t columns) : Quantizer::Scratch(memory, Quantizer::block_rows(columns), columns) {}
    };

    static int64_t scratch_bytes(int64_t columns) { return Scratch(nullptr, columns).bytes; }

    static void linear(const LinearCall& call, const BlockSparseWeight& weight, Range rows, Range strips,
                       void* memory) {
        const int64_t block = Quantizer::block_rows(call.weight.columns);
        const Scratch scratch(memory, call.weight.columns);
        Finish* finish_tile = nullptr;
        with_format(call.y_type, [&]<class Format>() {
            with_activation(call.activation,
                            [&]<Activation kActivation>() { finish_tile = dequantize<Format, kActivation, kColumns>; });
        });
        for (int64_t begin = rows.begin; begin < rows.end; begin += block) {
            const Range part{begin, rows.end - begin < block ? rows.end : begin + block};
            with_format(call.x_type,
                        [&]<class Format>() { Quantizer::template quantize_block<Format>(call, part, scratch); });
            for (int64_t strip = strips.begin; strip < strips.end; strip++)
                compute_strip(call, weight, part, strip, scratch, finish_tile);
        }
    }

    static void compute_strip(const LinearCall& call, const BlockSparseWeight& weight, Range rows, int64_t strip,
                              const Scratch& scratch, Finish* finish_tile) {
        const int64_t count = rows.end - rows.begin, stride = Quantizer::stride_of(call.weight.columns);
        const int64_t chunks = chunks_of(call.weight.columns);
        int32_t* sums = scratch.sums;
        for (int j = 0; j < kColumns; j++) sums[j] = Engine::start(weight.corrections, strip * kColumns + j);
        for (int64_t m = 1; m < count; m++) memcpy(sums + m * kColumns, sums, kColumns * sizeof(int32_t));
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int32_t* ends = weight.ends + (strip * chunks + chunk) * kStripGroups;
            const int64_t begin = strip + chunk == 0 ? 0 : ends[-1];
            const StripPart part{begin, ends, weight.inputs, weight.values};
            for (int64_t m = 0; m < count; m += Engine::kRows)
                Engine::tile(count - m < Engine::kRows ? count - m : Engine::kRows, scratch.quantized + m * stride,
                             stride, part, sums + m * kColumns);
        }
        const PanelColumns<kColumns> columns(call, strip * kColumns);
        const Rectangle y{call, rows.begin, count, strip * kColumns, columns.count};
        finish_tile(sums, scratch.scale, scratch.correction, columns, y);
    }
};

template <class Driver>
constexpr BlockSparseKernels block_sparse_table(Isa isa) {
    return {.isa = isa, .linear = Driver::linear, .scratch_bytes = Driver::scratch_bytes};
}

}  // namespace
}  // namespace ds_compress::cpu
