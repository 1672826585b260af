// The elementwise kernels of the CPU as a table of plain functions, one table per instruction set.
//
// A kernel is serial and works on a range; who calls it cuts the work into ranges for threads. No kernel checks its
// arguments. The formulas are those of ds_compress/math.h and of the references in ds_compress/ops/reference.
#pragma once

#include <cstdint>

#include "ds_compress/float_format.h"

namespace ds_compress::cpu {

enum class Float { fp32, bf16, fp16 };

// A packed mask: element i of a range is governed by bit `bit` + i; `bytes` is the length of the buffer.
struct Mask {
    const uint8_t* packed;
    int64_t bytes;
    int64_t bit;
};

// What a range of values spans. `largest_bits`: the greatest |bits|, so that NaN and Inf win.
struct Span {
    float lowest;
    float highest;
    uint32_t largest_bits;
};

// Keys of scores: of their absolute values, or in the order of signed ones. What is above `high` is kept, what lies in
// [low, high] is found.
struct Window {
    int32_t low;
    int32_t high;
    bool magnitude;
};

// `keys` and `places` have `inside` entries.
struct WindowFound {
    int64_t above;
    int64_t inside;
    int64_t non_finite;
    int32_t* keys;
    int32_t* places;
};

struct Grid {
    float scale;
    float offset;
    bool has_offset;
    float low;
    float high;
};

// How a payload is laid out; see ds_compress/ops/reference/block_quantize.py.
struct BlockFormat {
    int bits;        // 8 or 4
    int block;       // a multiple of 32 up to 8192
    int64_t blocks;  // in one payload
    int64_t value_bytes() const { return static_cast<int64_t>(block) * bits / 8; }
    int64_t payload_bytes() const { return blocks * (4 + value_bytes()); }
};

// Several payloads of one format, one after the other.
struct Payloads {
    const uint8_t* data;
    int64_t count;
    float multiplier;
};

struct ElementwiseKernels {
    // Elements of `size` bytes whose bit is cleared become `fill` (its bit pattern).
    void (*mask_apply)(void* data, int size, int64_t count, Mask mask, uint64_t fill);
    // Bytes that are not zero become set bits; unused bits of the last byte are zero.
    void (*mask_pack)(const uint8_t* mask, int64_t count, uint8_t* packed);
    void (*mask_unpack)(Mask mask, int64_t count, uint8_t* to);
    // `rows` rows of `columns` scores; writes whole bytes, the first row begins at a byte.
    void (*mask_n_of_m)(const float* scores, int64_t rows, int64_t columns, int n, int m, uint8_t* packed);
    // The bits of what competes (all where that is null) and is above the window; writes whole bytes. `keys` and
    // `places`, which count from `first`, have room for `count` entries.
    WindowFound (*mask_window)(const float* scores, const uint8_t* competing, int64_t count, int32_t first,
                               Window window, uint8_t* packed, int32_t* keys, int32_t* places);

    // Adds the squares of all values to sums[0], those of set bits (all without a mask) to sums[1].
    void (*mask_square_sums)(const void* values, Float type, int64_t count, Mask mask, double* sums);

    // `symmetric` leaves lowest and highest unset.
    Span (*measure)(const void* values, Float type, int64_t count, bool symmetric);
    // `mask` may be null; its bits begin at `bit`, and what precedes them in their first byte is left as it is.
    void (*fake_quantize)(const void* x, void* y, Float type, int64_t count, Grid grid, uint8_t* mask, int64_t bit);

    // The scales of `blocks` blocks of `block` values, which lie one after the other.
    void (*float_scales)(const void* x, Float type, int64_t blocks, int64_t block, const math::FloatFormat& format,
                         float global_scale, float* scales);
    // By these scales; `chosen`: by float_scales, from these values. `mask` and `bit` as above.
    void (*fake_quantize_float)(const void* x, void* y, Float type, int64_t blocks, int64_t block, const float* scales,
                                bool chosen, const math::FloatFormat& format, uint8_t* mask, int64_t bit);

    // Blocks [first, last) of `payload` from the values of these blocks, of which `count` exist (the others are 0).
    // `values` and `residual` (or null) begin at block `first`.
    void (*block_quantize)(const void* values, Float type, int64_t count, float* residual, uint8_t* payload,
                           BlockFormat format, int64_t first, int64_t last);
    // `out` begins at block `first` and has `count` elements.
    void (*block_dequantize)(const uint8_t* payload, BlockFormat format, int64_t first, int64_t last, void* out,
                             Float type, int64_t count);
    void (*block_reduce)(Payloads payloads, BlockFormat format, int64_t first, int64_t last, float* out, int64_t count);
    void (*block_reduce_quantize)(Payloads payloads, BlockFormat format, int64_t first, int64_t last, int64_t count,
                                  float* residual, uint8_t* payload);
};

// The table for `isa()`.
const ElementwiseKernels& elementwise();

// Null where the compiler was not told to use these instructions.
const ElementwiseKernels* elementwise_scalar();
const ElementwiseKernels* elementwise_avx2();
const ElementwiseKernels* elementwise_avx512();

}  // namespace ds_compress::cpu
