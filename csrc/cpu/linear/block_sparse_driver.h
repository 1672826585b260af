// The block-sparse int8 linear layer around a multiplication of one instruction set. To be included in its .cpp.
//
// An `Engine` has Values (see quantize.h) and kRows (rows of a tile), and
//     start(corrections, column)   what the sum of an output starts from
//     tile(rows, quantized, part, sums)
//                                  adds to up to kRows rows of sums (48 apart) what a chunk's blocks of a strip give;
//                                  quantized: [K / 16][rows][16], so that one address leads to all that meet a block
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

    using Stored = typename Engine::Values::Stored;

    struct Scratch {
        typename Quantizer::Scratch quantizer;
        Stored* tiles;
        int64_t bytes;

        Scratch(void* memory, int64_t columns)
            : quantizer(memory, Quantizer::block_rows(columns), columns), bytes(round_up(quantizer.bytes, 64)) {
            ScratchArrays arrays(static_cast<uint8_t*>(memory) + bytes);
            tiles = arrays.take<Stored>(Quantizer::block_rows(columns) * round_up(columns, kBlockInputs));
            bytes += arrays.bytes();
        }
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
            with_format(call.x_type, [&]<class Format>() {
                Quantizer::template quantize_block<Format>(call, part, scratch.quantizer);
            });
            interleave(part.end - part.begin, call.weight.columns, scratch);
            for (int64_t strip = strips.begin; strip < strips.end; strip++)
                compute_strip(call, weight, part, strip, scratch, finish_tile);
        }
    }

    // Rows by tiles, and within a tile by 16 values of K.
    static void interleave(int64_t count, int64_t columns, const Scratch& scratch) {
        const int64_t stride = Quantizer::stride_of(columns), blocks = round_up(columns, kBlockInputs) / kBlockInputs;
        for (int64_t m = 0; m < count; m += Engine::kRows) {
            const int64_t rows = count - m < Engine::kRows ? count - m : Engine::kRows;
            const Stored* from = scratch.quantizer.quantized + m * stride;
            Stored* to = scratch.tiles + m * blocks * kBlockInputs;
            for (int64_t block = 0; block < blocks; block++, from += kBlockInputs)
                for (int64_t r = 0; r < rows; r++, to += kBlockInputs)
                    memcpy(to, from + r * stride, kBlockInputs * sizeof(Stored));
        }
    }

    static void compute_strip(const LinearCall& call, const BlockSparseWeight& weight, Range rows, int64_t strip,
                              const Scratch& scratch, Finish* finish_tile) {
        const int64_t count = rows.end - rows.begin, chunks = chunks_of(call.weight.columns);
        const int64_t depth = round_up(call.weight.columns, kBlockInputs);
        int32_t* sums = scratch.quantizer.sums;
        for (int j = 0; j < kColumns; j++) sums[j] = Engine::start(weight.corrections, strip * kColumns + j);
        for (int64_t m = 1; m < count; m++) memcpy(sums + m * kColumns, sums, kColumns * sizeof(int32_t));
        const PanelColumns<kColumns> columns(call, strip * kColumns);
        int64_t chunk = 0;
        do {  // once even if K is 0
            const int32_t* ends = weight.ends + (strip * chunks + chunk) * kStripGroups;
            const StripPart part{strip + chunk == 0 || chunks == 0 ? 0 : ends[-1], ends, weight.inputs, weight.values};
            const bool last = ++chunk >= chunks;
            for (int64_t m = 0; m < count; m += Engine::kRows) {
                const int64_t tile_rows = count - m < Engine::kRows ? count - m : Engine::kRows;
                const Rectangle y{call, rows.begin + m, tile_rows, strip * kColumns, columns.count};
                if (last) y.prefetch();
                if (chunks > 0) Engine::tile(tile_rows, scratch.tiles + m * depth, part, sums + m * kColumns);
                if (last)
                    finish_tile(sums + m * kColumns, scratch.quantizer.scale + m, scratch.quantizer.correction + m,
                                columns, y);
            }
        } while (chunk < chunks);
    }
};

template <class Driver>
constexpr BlockSparseKernels block_sparse_table(Isa isa) {
    return {.isa = isa, .linear = Driver::linear, .scratch_bytes = Driver::scratch_bytes};
}

}  // namespace
}  // namespace ds_compress::cpu
