// The weight-only linear layer around a multiplication of one instruction set. To be included in its .cpp.
//
// An `Engine` has
//     transpose(digits, to)           bytes 0, 1, 2, 3 of each four Ints lanes, one after the other
//     tile<storage, bytes>(tile)      adds to the values of some rows of one panel; see Tile
//     kRows                           most rows of a tile
#pragma once

#include "../linear/epilogue.h"
#include "../linear/scratch.h"
#include "weight_only.h"

namespace ds_compress::cpu {
namespace {

constexpr int64_t kQuadBytes =
    16;  // of x: the bytes of 4 inputs, the lowest of all four first; the last 4 are not read
constexpr int64_t kXBytes = 512 << 10;  // of a block of rows in fixed point, so that it stays in the second-level cache
constexpr int64_t kMostRows = 96, kLeastRows = 12;
constexpr int64_t kPrefetchAhead = 8192;

// What belongs to the inputs that share a power of two.
struct BlockHead {
    float unit;       // what the fixed-point numbers are multiplied by
    float sum;        // of the inputs; only for weights with offsets
    int32_t from[3];  // what the sums of products start from, by byte: -excess times the sum of the bytes
    int32_t spare[3];
};
static_assert(sizeof(BlockHead) == 32);

struct Tile {
    int64_t rows;
    const uint8_t* x;
    int64_t x_stride;
    const BlockHead* heads;
    int64_t heads_stride;
    const uint8_t* panel;
    const WeightOnlyWeight* weight;
    float* values;  // (rows, 64)
    bool streams;   // the panel comes from memory: prefetch it
};

/// f(words, count, head, scales): every block of a panel. `words`: of 4 * 64 bytes; `count`: of them; `head`: the
/// number of the block; `quad`: the number of its first four inputs.
template <int kInputs, class F>
DSC_INLINE void for_blocks(const Tile& tile, const F& f) {
    const WeightOnlyWeight& weight = *tile.weight;
    const int64_t width = weight.padded_group();
    const uint8_t* group = tile.panel;
    int64_t head = 0, quad = 0;
    for (int64_t g = 0; g < weight.groups; g++) {
        const auto* scales = reinterpret_cast<const float*>(group);
        const uint8_t* words = group + weight.head_bytes();
        for (int64_t begin = 0; begin < width; begin += kFixedPointBlock, head++) {
            const int64_t count = (width - begin < kFixedPointBlock ? width - begin : kFixedPointBlock) / kInputs;
            f(words, count, head, quad, scales);
            words += count * 4 * kWeightOnlyColumns;
            quad += count * (kInputs / 4);
        }
        group = words;
    }
}

// values += sum * unit * scale (+ sum of x * offset) for kLanes columns. Products with powers of two are exact, so that
// they may be fused with the addition.
template <int kBytes>
DSC_INLINE void add_block(const Ints* sums, const BlockHead& head, const float* scales, bool has_offset,
                          float* values) {
    const Floats low = __builtin_convertvector((sums[1] << 8) + sums[0], Floats);
    Floats sum = low;
    if constexpr (kBytes == 3) sum = __builtin_convertvector(sums[2], Floats) * 65536.0f + low;
    Floats value = load_as<Floats>(values) + sum * splat(head.unit) * load_as<Floats>(scales);
    if (has_offset) value += splat(head.sum) * load_as<Floats>(scales + kWeightOnlyColumns);
    store(values, value);
}

// y = activation(value + bias) for rows of one panel.
inline void finish_rows(const WeightOnlyCall& call, int64_t row, int64_t rows, int64_t column, const float* values) {
    const int64_t left = call.weight.rows - column;
    const int64_t count = left < kWeightOnlyColumns ? left : kWeightOnlyColumns;
    alignas(64) float bias[kWeightOnlyColumns];
    for (float& b : bias) b = -0.0f;  // adds nothing, not even to -0.0
    if (call.bias != nullptr) memcpy(bias, call.bias + column, static_cast<size_t>(count) * sizeof(float));
    with_format(call.y_type, [&]<class Format>() {
        with_activation(call.activation, [&]<Activation kActivation>() {
            auto* y = static_cast<typename Format::Stored*>(call.y) + row * call.weight.rows + column;
            for (int64_t m = 0; m < rows; m++, y += call.weight.rows, values += kWeightOnlyColumns)
                for (int j = 0; j < kWeightOnlyColumns; j += kLanes)
                    finish<Format, kActivation>(y, j, count, load_as<Floats>(values + j) + load_as<Floats>(bias + j));
        });
    });
}

template <class Engine>
struct WeightOnlyDriver {
    struct Shape {
        int64_t blocks, x_stride, rows;

        Shape(const WeightOnlyWeight& weight, int64_t most) {
            blocks = weight.groups * weight.blocks_per_group();
            // One cache line more, so that rows do not all fall into the same cache sets.
            x_stride = weight.groups * weight.padded_group() * (kQuadBytes / 4) + 64;
            const int64_t fitting = kXBytes / x_stride;
            rows = fitting < kLeastRows ? kLeastRows : fitting > kMostRows ? kMostRows : fitting;
            rows = rows / Engine::kRows * Engine::kRows;
            if (rows > most) rows = most;
        }
    };

    struct Scratch {
        BlockHead* heads;
        uint8_t* x;
        float* values;
        int64_t bytes;

        Scratch(void* memory, const Shape& shape) {
            ScratchArrays arrays(memory);
            values = arrays.take<float>(Engine::kRows * kWeightOnlyColumns);
            heads = arrays.take<BlockHead>(shape.rows * shape.blocks);
            x = arrays.take<uint8_t>(shape.rows * shape.x_stride);
            bytes = arrays.bytes();
        }
    };

    static int64_t scratch_bytes(const WeightOnlyWeight& weight, int64_t rows) {
        return Scratch(nullptr, Shape(weight, rows)).bytes;
    }

    static void linear(const WeightOnlyCall& call, Range rows, Range panels, void* memory) {
        const Shape shape(call.weight, rows.end - rows.begin);
        const Scratch scratch(memory, shape);
        for (int64_t begin = rows.begin; begin < rows.end; begin += shape.rows) {
            const int64_t count = rows.end - begin < shape.rows ? rows.end - begin : shape.rows;
            with_format(call.x_type, [&]<class Format>() {
                constexpr int kBytes = sizeof(typename Format::Stored) == 4 ? 3 : 2;
                const auto* x = static_cast<const typename Format::Stored*>(call.x) + begin * call.weight.columns;
                for (int64_t m = 0; m < count; m++)
                    to_fixed_point<Format, kBytes>(x + m * call.weight.columns, call.weight,
                                                   scratch.heads + m * shape.blocks, scratch.x + m * shape.x_stride);
            });
            for (int64_t panel = panels.begin; panel < panels.end; panel++)
                compute_panel(call, begin, count, panel, shape, scratch);
        }
    }

    // --- x ---------------------------------------------------------------------------------------------------------

    template <class Format, int kBytes>
    static void to_fixed_point(const typename Format::Stored* x, const WeightOnlyWeight& weight, BlockHead* heads,
                               uint8_t* to) {
        const int64_t width = weight.padded_group();
        for (int64_t group = 0; group < weight.groups; group++) {
            const int64_t first = group * weight.group_size;
            const int64_t end = first + weight.group_size < weight.columns ? first + weight.group_size : weight.columns;
            for (int64_t begin = 0; begin < width; begin += kFixedPointBlock, heads++) {
                const int64_t size = width - begin < kFixedPointBlock ? width - begin : kFixedPointBlock;
                const int64_t left = end - first - begin, count = left < size ? (left > 0 ? left : 0) : size;
                const auto* from = x + first + begin;
                typename Format::Stored whole[kFixedPointBlock] = {};
                if (count < size) {
                    for (int64_t i = 0; i < count; i++) whole[i] = from[i];
                    from = whole;
                }
                block_to_fixed_point<Format, kBytes>(from, size, weight.excess, *heads, to);
                to += size * (kQuadBytes / 4);
            }
        }
    }

    // `size` values, a multiple of kWeightOnlyStep.
    template <class Format, int kBytes>
    static DSC_INLINE void block_to_fixed_point(const typename Format::Stored* x, int64_t size, int excess,
                                                BlockHead& head, uint8_t* to) {
        Ints largest = {};
        for (int64_t i = 0; i < size; i += kLanes)
            largest = larger(largest, bits_of(Format::load(x + i)) & splat(INT32_MAX));
        const auto bits = static_cast<uint32_t>(largest_of(largest));
        const bool is_finite = bits < math::kInfinityBits;
        // The exponent of a power of two that all values fit below, with a little room for numbers of signed bytes.
        uint32_t exponent = (bits + (1u << 17)) >> 23;
        exponent = exponent < kLeastExponent ? kLeastExponent : exponent;
        const int digits = 8 * kBytes - 2;
        const float unit = math::float_of((exponent - digits) << 23);
        const Floats steps = splat(is_finite ? math::float_of((254 + digits - exponent) << 23) : 0.0f);
        const Ints offsets = splat(kBytes == 3 ? 0x808080 : 0x8080);
        Ints sums[3] = {};
        for (int64_t i = 0; i < size; i += kLanes, to += 4 * kLanes) {
            const Ints whole = is_finite ? nearest_int(Format::load(x + i) * steps) : Ints{};
            const Ints bytes = (whole + offsets) ^ offsets;
            Engine::transpose(bytes, to);
            sums[0] += (bytes << 24) >> 24;
            sums[1] += (bytes << 16) >> 24;
            if constexpr (kBytes == 3) sums[2] += (bytes << 8) >> 24;
        }
        int32_t totals[3];
        for (int i = 0; i < 3; i++) totals[i] = total_of(sums[i]);
        head.unit = is_finite ? unit : math::float_of(math::kNanBits);
        head.sum = static_cast<float>(totals[2] * 65536 + totals[1] * 256 + totals[0]) * head.unit;
        for (int i = 0; i < 3; i++) head.from[i] = -excess * totals[i];
    }

    static constexpr uint32_t kLeastExponent = 24;  // its unit and the reciprocal of that are normal numbers

    static DSC_INLINE Ints nearest_int(Floats value) {
#if defined(DSC_AVX512)
        return (Ints)_mm512_cvtps_epi32(value);
#elif defined(DSC_AVX2)
        return (Ints)_mm256_cvtps_epi32(value);
#else
        return __builtin_convertvector(round_half_even(value), Ints);
#endif
    }

    static DSC_INLINE int32_t total_of(Ints values) {
        int32_t total = 0;
        for (int i = 0; i < kLanes; i++) total += values[i];
        return total;
    }

    // --- products --------------------------------------------------------------------------------------------------

    static void compute_panel(const WeightOnlyCall& call, int64_t begin, int64_t count, int64_t panel,
                              const Shape& shape, const Scratch& scratch) {
        const WeightOnlyWeight& weight = call.weight;
        for (int64_t m = 0; m < count; m += Engine::kRows) {
            const int64_t rows = count - m < Engine::kRows ? count - m : Engine::kRows;
            memset(scratch.values, 0, static_cast<size_t>(rows * kWeightOnlyColumns) * sizeof(float));
            const Tile tile{rows,           scratch.x + m * shape.x_stride,
                            shape.x_stride, scratch.heads + m * shape.blocks,
                            shape.blocks,   weight.body + panel * weight.panel_bytes(),
                            &weight,        scratch.values,
                            m == 0};
            if (call.x_type == LinearType::fp32)
                multiply<3>(weight.storage, tile);
            else
                multiply<2>(weight.storage, tile);
            finish_rows(call, begin + m, rows, panel * kWeightOnlyColumns, scratch.values);
        }
    }

    template <int kBytes>
    static DSC_INLINE void multiply(Storage storage, const Tile& tile) {
        switch (storage) {
            case Storage::int2:
                return Engine::template tile<Storage::int2, kBytes>(tile);
            case Storage::int4:
                return Engine::template tile<Storage::int4, kBytes>(tile);
            case Storage::int8:
                return Engine::template tile<Storage::int8, kBytes>(tile);
            case Storage::e2m1:
                return Engine::template tile<Storage::e2m1, kBytes>(tile);
        }
    }
};

template <class Engine>
constexpr WeightOnlyKernels weight_only_table(Isa isa) {
    return {.isa = isa,
            .linear = WeightOnlyDriver<Engine>::linear,
            .scratch_bytes = WeightOnlyDriver<Engine>::scratch_bytes};
}

}  // namespace
}  // namespace ds_compress::cpu
