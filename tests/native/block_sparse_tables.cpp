// The block-sparse kernels of every instruction set behind one C function, as linear_tables.cpp has the dense ones.
#include <cstdint>
#include <vector>

#include "../../csrc/cpu/linear/block_sparse.h"

namespace ds_compress::cpu {
Isa isa() { return Isa::scalar; }  // nothing here chooses by it
const char* name_of(Isa) { return ""; }
const BlockSparseKernels* block_sparse_avx512_emulated();
}  // namespace ds_compress::cpu

using namespace ds_compress;
using namespace ds_compress::cpu;

struct Arguments {
    const void* x;
    void* y;
    const uint8_t* packed;
    const float* weight_scale;
    const float* bias;
    const float* input_scale;
    int64_t rows, out_features, columns, blocks;
    int32_t x_type, y_type, steps, activation, row_parts, strip_parts;
};

// Multiplies in row_parts x strip_parts pieces. 0, or 1 where something was written behind the scratch memory.
extern "C" __attribute__((visibility("default"))) int dsc_test_block_sparse(int which, const Arguments* a) {
    const BlockSparseKernels* (*const tables[])() = {block_sparse_scalar, block_sparse_avx2, block_sparse_avx512,
                                                     block_sparse_avx512_emulated};
    const BlockSparseKernels& kernels = *tables[which]();
    const BlockSparseLayout layout(a->out_features, a->columns, a->blocks);
    const uint8_t* body = a->packed + sizeof(PackedHeader);
    const BlockSparseWeight weight{
        reinterpret_cast<const int32_t*>(body), reinterpret_cast<const int32_t*>(body + layout.ends),
        reinterpret_cast<const uint16_t*>(body + layout.inputs), reinterpret_cast<const int8_t*>(body + layout.values)};
    const LinearCall call{a->x,
                          static_cast<LinearType>(a->x_type),
                          a->rows,
                          {nullptr, a->out_features, a->columns, 0, 0},
                          a->weight_scale,
                          a->bias,
                          a->input_scale,
                          a->steps,
                          static_cast<Activation>(a->activation),
                          a->y,
                          static_cast<LinearType>(a->y_type)};
    const int64_t bytes = kernels.scratch_bytes(a->columns);
    std::vector<uint8_t> memory(bytes + 192, 0xa5);  // quantized values that nobody wrote are not zero
    uint8_t* scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
    const int64_t strips = round_up(a->out_features, kStripOutputs) / kStripOutputs;
    for (int64_t i = 0; i < a->row_parts; i++)
        for (int64_t j = 0; j < a->strip_parts; j++)
            kernels.linear(call, weight, {a->rows * i / a->row_parts, a->rows * (i + 1) / a->row_parts},
                           {strips * j / a->strip_parts, strips * (j + 1) / a->strip_parts}, scratch);
    for (int i = 0; i < 64; i++)
        if (scratch[bytes + i] != 0xa5) return 1;
    return 0;
}
