// Many rows of bf16 by AMX tiles. Compiled with the AVX-512 flags; the instructions of AMX and AVX512_BF16, which need
// none, are written out.
//
// Loops, from the outside: blocks of rows; chunks of inputs, for which the rows of x are copied to tiles of 16 rows by
// 32 inputs; panels, whose chunk is dequantized in fp32, rounded to bf16 and laid out as tiles of 32 inputs by 16
// columns, pairs of inputs side by side; halves of the panel, whose tiles stay in the first-level cache; 32 rows, whose
// sums wait in fp32. So a weight is dequantized once for all rows of a block.
#include "weight_only.h"

// gcc 12 finds its own intrinsics' "undefined" operands uninitialized.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#if defined(__AVX512VNNI__)
#include <immintrin.h>

#include "../amx.h"
#include "driver.h"
#include "values.h"

namespace ds_compress::cpu {
namespace {

constexpr int64_t kTileInputs = 32;
constexpr int64_t kFewestRows = 20;      // fewer are faster as integers
constexpr int64_t kChunk = 512;          // inputs
constexpr int64_t kMostBlockRows = 512;  // so that their chunk stays in the second-level cache
constexpr int64_t kLeastBlockRows = 64;
constexpr int64_t kSumBytes = 4 << 20;  // of a block's results

// The two floats of every column, rounded to bf16, in one lane.
DSC_INLINE __m512i pairs_of(__m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(odd), "v"(even));
    return _mm512_permutexvar_epi16(order, both);
}

// What a stored value of up to 4 bits stands for.
template <Storage kStorage>
DSC_INLINE __m512 table_of(int excess) {
    alignas(64) float table[16];
    for (int i = 0; i < 16; i++) table[i] = static_cast<float>(value_of<kStorage>(i) - excess);
    return _mm512_load_ps(table);
}

// Input kInput of each word, dequantized.
template <Storage kStorage, int kInput>
DSC_INLINE __m512 input_of(__m512i words, __m512 table, __m512i excess, __m512 scale, __m512 offset, bool has_offset) {
    constexpr int kBits = bits_of_storage(kStorage), kShift = kInput % 4 * 8 + kInput / 4 * kBits;
    __m512i stored = kShift == 0 ? words : _mm512_srli_epi32(words, kShift);
    __m512 value;
    if constexpr (kStorage == Storage::int8) {
        stored = _mm512_and_si512(stored, _mm512_set1_epi32(255));
        value = _mm512_cvtepi32_ps(_mm512_sub_epi32(stored, excess));
    } else {
        if constexpr (kBits < 4) stored = _mm512_and_si512(stored, _mm512_set1_epi32((1 << kBits) - 1));
        value = _mm512_permutexvar_ps(stored, table);  // by the low four bits
    }
    value = _mm512_mul_ps(value, scale);
    return has_offset ? _mm512_add_ps(value, offset) : value;
}

// Some inputs of a panel as tiles, [inputs / 32][4 times 16 columns].
template <Storage kStorage>
void dequantize_panel(const uint8_t* panel, const WeightOnlyWeight& weight, Range inputs, uint8_t* tiles) {
    constexpr int kInputs = 32 / bits_of_storage(kStorage);
    const __m512 table = table_of<kStorage>(weight.excess);
    const __m512i excess = _mm512_set1_epi32(weight.excess);
    for (int64_t k = inputs.begin; k < inputs.end;) {
        const int64_t group = k / weight.group_size, first = group * weight.group_size;
        const int64_t end = first + weight.group_size < inputs.end ? first + weight.group_size : inputs.end;
        const uint8_t* head = panel + group * weight.group_bytes();
        const auto* scales = reinterpret_cast<const float*>(head);
        const uint8_t* w = head + weight.head_bytes() + (k - first) / kInputs * 4 * kWeightOnlyColumns;
        for (; k < end; k += kInputs, w += 4 * kWeightOnlyColumns) {
            const int64_t at = k - inputs.begin;
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                __builtin_prefetch(w + weight.panel_bytes() + 64 * c);  // of the next panel
                const __m512i packed = _mm512_loadu_si512(w + 64 * c);
                const __m512 scale = _mm512_loadu_ps(scales + 16 * c);
                const __m512 offset =
                    weight.has_offset ? _mm512_loadu_ps(scales + kWeightOnlyColumns + 16 * c) : _mm512_setzero_ps();
                uint8_t* to = tiles + (at / kTileInputs * 4 + c) * kTileBytes + at % kTileInputs / 2 * 64;
                const auto store_pair = [&]<int kPair>() __attribute__((always_inline)) {
                    _mm512_store_si512(
                        to + 64 * kPair,
                        pairs_of(input_of<kStorage, 2 * kPair>(packed, table, excess, scale, offset, weight.has_offset),
                                 input_of<kStorage, 2 * kPair + 1>(packed, table, excess, scale, offset,
                                                                   weight.has_offset)));
                };
                store_pair.template operator()<0>();
                store_pair.template operator()<1>();
                if constexpr (kInputs > 4) {
                    store_pair.template operator()<2>();
                    store_pair.template operator()<3>();
                }
                if constexpr (kInputs > 8) {
                    store_pair.template operator()<4>();
                    store_pair.template operator()<5>();
                    store_pair.template operator()<6>();
                    store_pair.template operator()<7>();
                }
            }
        }
    }
}

// 32 rows by 32 columns of sums, from and to `values` (rows 64 apart). a: two rows of tiles, `a_stride` apart; b: as of
// `dequantize_panel`; count: of tiles.
void multiply_tiles(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t count, float* values) {
    const int64_t row = 64, result_row = 4 * kWeightOnlyColumns;
    float* lower = values + kTileRows * kWeightOnlyColumns;
    asm volatile(
        "tileloadd (%0, %2), %%tmm0\n\t"
        "tileloadd 64(%0, %2), %%tmm1\n\t"
        "tileloadd (%1, %2), %%tmm2\n\t"
        "tileloadd 64(%1, %2), %%tmm3" ::"r"(values),
        "r"(lower), "r"(result_row)
        : "memory");
    const uint8_t* other = a + a_stride;
    for (int64_t k = 0; k < count; k++, a += kTileBytes, other += kTileBytes, b += 4 * kTileBytes)
        asm volatile(
            "tileloadd (%0, %4), %%tmm4\n\t"
            "tileloadd (%2, %4), %%tmm6\n\t"
            "tileloadd (%3, %4), %%tmm7\n\t"
            "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
            "tileloadd (%1, %4), %%tmm5\n\t"
            "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
            "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\t"
            "tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::"r"(a),
            "r"(other), "r"(b), "r"(b + kTileBytes), "r"(row)
            : "memory");
    asm volatile(
        "tilestored %%tmm0, (%0, %2)\n\t"
        "tilestored %%tmm1, 64(%0, %2)\n\t"
        "tilestored %%tmm2, (%1, %2)\n\t"
        "tilestored %%tmm3, 64(%1, %2)" ::"r"(values),
        "r"(lower), "r"(result_row)
        : "memory");
}

int64_t amx_block_rows(const WeightOnlyWeight& weight, int64_t rows) {
    const int64_t fitting = kSumBytes / (weight.panels() * kWeightOnlyColumns * 4) / 32 * 32;
    const int64_t most = fitting < kLeastBlockRows  ? kLeastBlockRows
                         : fitting > kMostBlockRows ? kMostBlockRows
                                                    : fitting;
    return rows < most ? round_up(rows, 32) : most;
}

struct AmxScratch {
    uint8_t *x, *panel;
    float* values;  // [panels][rows][64]
    int64_t bytes;

    AmxScratch(void* memory, int64_t rows, int64_t panels) {
        ScratchArrays arrays(memory);
        x = arrays.take<uint8_t>(rows * kChunk * 2);
        panel = arrays.take<uint8_t>(kChunk * kWeightOnlyColumns * 2);
        values = arrays.take<float>(panels * rows * kWeightOnlyColumns);
        bytes = arrays.bytes();
    }
};

// Rows of x, `stride` apart, as tiles, [rows / 16][depth]; rows from `count` on are zeros.
void tile_rows(const uint16_t* x, int64_t stride, int64_t count, int64_t rows, int64_t depth, uint8_t* to) {
    for (int64_t m = 0; m < rows; m++) {
        uint8_t* line = to + (m / kTileRows * depth) * kTileBytes + m % kTileRows * 64;
        for (int64_t k = 0; k < depth; k++, line += kTileBytes)
            _mm512_storeu_si512(
                line, m < count ? _mm512_loadu_si512(x + m * stride + k * kTileInputs) : _mm512_setzero_si512());
    }
}

void dequantize_panel(const uint8_t* panel, const WeightOnlyWeight& weight, Range inputs, uint8_t* tiles) {
    switch (weight.storage) {
        case Storage::int2:
            return dequantize_panel<Storage::int2>(panel, weight, inputs, tiles);
        case Storage::int4:
            return dequantize_panel<Storage::int4>(panel, weight, inputs, tiles);
        case Storage::int8:
            return dequantize_panel<Storage::int8>(panel, weight, inputs, tiles);
        case Storage::e2m1:
            return dequantize_panel<Storage::e2m1>(panel, weight, inputs, tiles);
    }
}

void amx_linear(const WeightOnlyCall& call, Range rows, Range panels, void* memory) {
    const WeightOnlyWeight& weight = call.weight;
    const int64_t block = amx_block_rows(weight, rows.end - rows.begin);
    const AmxScratch scratch(memory, block, weight.panels());
    const Tiles tiles;
    for (int64_t begin = rows.begin; begin < rows.end; begin += block) {
        const int64_t count = rows.end - begin < block ? rows.end - begin : block, padded = round_up(count, 32);
        const int64_t panel_values = padded * kWeightOnlyColumns;
        memset(scratch.values, 0, static_cast<size_t>((panels.end - panels.begin) * panel_values) * sizeof(float));
        const auto* x = static_cast<const uint16_t*>(call.x) + begin * weight.columns;
        for (int64_t k = 0; k < weight.columns; k += kChunk) {
            const int64_t end = k + kChunk < weight.columns ? k + kChunk : weight.columns;
            const int64_t depth = (end - k) / kTileInputs;
            tile_rows(x + k, weight.columns, count, padded, depth, scratch.x);
            for (int64_t panel = panels.begin; panel < panels.end; panel++) {
                dequantize_panel(weight.body + panel * weight.panel_bytes(), weight, {k, end}, scratch.panel);
                float* values = scratch.values + (panel - panels.begin) * panel_values;
                for (int half = 0; half < 2; half++)
                    for (int64_t m = 0; m < padded; m += 32)
                        multiply_tiles(scratch.x + m / kTileRows * depth * kTileBytes, depth * kTileBytes,
                                       scratch.panel + half * 2 * kTileBytes, depth,
                                       values + m * kWeightOnlyColumns + 32 * half);
            }
        }
        for (int64_t panel = panels.begin; panel < panels.end; panel++)
            finish_rows(call, begin, count, panel * kWeightOnlyColumns,
                        scratch.values + (panel - panels.begin) * panel_values);
    }
}

bool amx_takes(const WeightOnlyCall& call) {
    const WeightOnlyWeight& weight = call.weight;
    return call.x_type == LinearType::bf16 && call.rows >= kFewestRows && weight.columns > 0 &&
           weight.group_size % kTileInputs == 0 && weight.columns % weight.group_size == 0;
}

}  // namespace
}  // namespace ds_compress::cpu

const ds_compress::cpu::WeightOnlyAmx* ds_compress::cpu::weight_only_amx() {
    static constexpr WeightOnlyAmx kFunctions = {
        .takes = amx_takes, .linear = amx_linear, .scratch_bytes = [](const WeightOnlyWeight& weight, int64_t rows) {
            return AmxScratch(nullptr, amx_block_rows(weight, rows), weight.panels()).bytes;
        }};
    return &kFunctions;
}
#else
const ds_compress::cpu::WeightOnlyAmx* ds_compress::cpu::weight_only_amx() { return nullptr; }
#endif
