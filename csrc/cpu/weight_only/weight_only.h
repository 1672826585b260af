// Linear layers whose weights alone are quantized, on the CPU, as a table of plain functions per instruction set.
//
// A weight is packed in panels of 64 output columns, in one layout for all instruction sets: for each group of inputs
// 64 fp32 scales, 64 fp32 offsets where there are any, then words of 4 bytes, one for each column: the values of 4
// inputs (8 bits), 8 inputs (4 bits; the first four in the low nibbles) or 16 inputs (2 bits). Inputs of a group are
// padded to a multiple of 16 with zeros. So a product reads each panel once, from its first byte to its last.
//
// Values of x become fixed-point numbers of three signed bytes (fp32) or two (bf16, fp16) that share a power of two
// with at most 127 neighbours; bytes are multiplied by quantized values in integers, exactly. The numerics are those of
// ds_compress/ops/reference/weight_only.py, bit for bit for the activations none and relu.
#pragma once

#include <cstdint>

#include "../isa.h"
#include "../linear/linear.h"

namespace ds_compress::cpu {

// How quantized values are stored: unsigned, `excess` more than they are. The numbers stand in packed weights.
enum class Storage : int { int2 = 0, int4 = 1, int8 = 2, e2m1 = 3 };

constexpr int64_t kWeightOnlyColumns = 64;  // of a panel
constexpr int64_t kWeightOnlyStep = 16;     // inputs of a group are padded to a multiple of it
constexpr int64_t kFixedPointBlock = 128;   // inputs of a group that share a power of two, at most

struct WeightOnlyWeight {
    const uint8_t* body;
    int64_t rows, columns;  // N, K
    int64_t groups, group_size;
    Storage storage;
    int excess;       // 0 where there are offsets
    bool has_offset;  // weight = scale * value + offset

    int64_t padded_group() const { return (group_size + kWeightOnlyStep - 1) / kWeightOnlyStep * kWeightOnlyStep; }
    int64_t blocks_per_group() const { return (group_size + kFixedPointBlock - 1) / kFixedPointBlock; }
    int64_t bits() const { return storage == Storage::int2 ? 2 : storage == Storage::int8 ? 8 : 4; }
    int64_t head_bytes() const { return kWeightOnlyColumns * 4 * (has_offset ? 2 : 1); }
    int64_t group_bytes() const { return head_bytes() + kWeightOnlyColumns * padded_group() * bits() / 8; }
    int64_t panel_bytes() const { return groups * group_bytes(); }
    int64_t panels() const { return (rows + kWeightOnlyColumns - 1) / kWeightOnlyColumns; }
};

struct WeightOnlyCall {
    const void* x;  // (rows, K)
    LinearType x_type;
    int64_t rows;
    WeightOnlyWeight weight;
    const float* bias;  // (N,) or null
    Activation activation;
    void* y;  // (rows, N)
    LinearType y_type;
};

struct WeightOnlyKernels {
    Isa isa;
    // A rectangle of the result, rows by panels.
    void (*linear)(const WeightOnlyCall& call, Range rows, Range panels, void* scratch);
    // Bytes of scratch, aligned to 64, that a call needs for at most `rows` rows.
    int64_t (*scratch_bytes)(const WeightOnlyWeight& weight, int64_t rows);
};

// Panels of row-major values (N, K), int8 or (has_offset) uint8; codes of Storage::e2m1. scale, offset: (N, groups).
void weight_only_pack(const uint8_t* values, const float* scale, const float* offset, const WeightOnlyWeight& weight,
                      Range panels, uint8_t* body);

// The table for `isa()`.
const WeightOnlyKernels& weight_only_kernels();

// Null where the compiler was not told to use these instructions.
const WeightOnlyKernels* weight_only_scalar();
const WeightOnlyKernels* weight_only_avx2();
const WeightOnlyKernels* weight_only_avx512();

// For many rows of bf16 on CPUs with AMX, the weight is rounded to bf16, a panel at a time, and products are summed in
// fp32 by tiles: faster, with other bits than the tables give. Null where the compiler was not told of AVX-512.
struct WeightOnlyAmx {
    bool (*takes)(const WeightOnlyCall& call);
    void (*linear)(const WeightOnlyCall& call, Range rows, Range panels, void* scratch);
    int64_t (*scratch_bytes)(const WeightOnlyWeight& weight, int64_t rows);
};
const WeightOnlyAmx* weight_only_amx();

}  // namespace ds_compress::cpu
