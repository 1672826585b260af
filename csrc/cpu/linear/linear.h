// Integer linear layers on the CPU as a table of plain functions, one table per instruction set.
//
// A weight is packed in panels of `panel_columns` output columns. A kernel is serial and computes a rectangle of the
// result, rows by panels; who calls it cuts the work for threads. No kernel checks its arguments. The numerics are
// those of ds_compress/ops/reference/linear.py, bit for bit for the activations none and relu.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace ds_compress::cpu {

enum class LinearType { fp32, bf16, fp16 };
enum class Activation { none, relu, gelu_erf, gelu_tanh, silu };

struct Range {
    int64_t begin;
    int64_t end;
};

struct LinearWeight {
    const uint8_t* body;  // what follows the header, 64-byte aligned or not
    int64_t rows;         // N
    int64_t columns;      // K
    int64_t groups;       // int4: scales of a row
    int64_t group_size;   // int4: columns that share a scale
};

struct LinearCall {
    const void* x;  // (rows, K)
    LinearType x_type;
    int64_t rows;
    LinearWeight weight;
    const float* weight_scale;  // (N,), int8 only
    const float* bias;          // (N,) or null
    const float* input_scale;   // (1,), or null for one scale per row
    int steps;
    Activation activation;
    void* y;  // (rows, N)
    LinearType y_type;
};

struct LinearKernels {
    Isa isa;
    int64_t int8_layout;
    int64_t int4_layout;
    int64_t panel_columns;

    // Bytes of a packed panel.
    int64_t (*int8_panel_bytes)(const LinearWeight& weight);
    int64_t (*int4_panel_bytes)(const LinearWeight& weight);

    // Panels of row-major quantized (N, K).
    void (*int8_pack)(const int8_t* quantized, const LinearWeight& weight, Range panels, void* scratch, uint8_t* body);
    // Quantizes with `scale` (one per row of the weight, or one for all) and packs in one pass.
    void (*int8_quantize_pack)(const void* values, LinearType type, const float* scale, bool scale_per_row, int steps,
                               const LinearWeight& weight, Range panels, void* scratch, uint8_t* body);
    void (*int8_linear)(const LinearCall& call, Range rows, Range panels, void* scratch);

    // quantized (N, K) in [-8, 7], scale (N, groups).
    void (*int4_pack)(const int8_t* quantized, const float* scale, const LinearWeight& weight, Range panels,
                      uint8_t* body);
    void (*int4_linear)(const LinearCall& call, Range rows, Range panels, void* scratch);

    // Bytes of scratch, aligned to 64, that one call of any kernel needs for rows of `columns` in `groups`.
    int64_t (*scratch_bytes)(int64_t columns, int64_t groups);
};

// The table for `isa()`.
const LinearKernels& linear_kernels();

// Null where the compiler was not told to use these instructions.
const LinearKernels* linear_scalar();
const LinearKernels* linear_avx2();
const LinearKernels* linear_avx512();
// That of AVX-512, where tiles of AMX multiply int8 values.
const LinearKernels* linear_amx();

}  // namespace ds_compress::cpu
