// The tables of linear kernels of every instruction set behind C functions, for tests that call each in one process.
#include <cstring>
#include <vector>

#include "../../csrc/cpu/linear/linear.h"
#include "ds_compress/packed.h"

namespace ds_compress::cpu {
const LinearKernels* linear_avx512_emulated();
const LinearKernels* linear_amx_emulated();
}  // namespace ds_compress::cpu

using namespace ds_compress;
using namespace ds_compress::cpu;

namespace {

const LinearKernels* table_of(int which) {
    const LinearKernels* (*const tables[])() = {linear_scalar,          linear_avx2, linear_avx512,
                                                linear_avx512_emulated, linear_amx,  linear_amx_emulated};
    return tables[which]();
}

// Memory whose end is where it was asked to be, so that a poisoned word behind it shows what was written too far.
struct Guarded {
    explicit Guarded(int64_t bytes) : size(bytes), data(bytes + 128, 0xa5) {}
    uint8_t* begin() { return data.data() + (64 - reinterpret_cast<uintptr_t>(data.data()) % 64); }
    bool intact() {
        for (int i = 0; i < 16; i++)
            if (begin()[size + i] != 0xa5) return false;
        return true;
    }
    int64_t size;
    std::vector<uint8_t> data;
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

struct Arguments {
    const void* x;
    void* y;
    const int8_t* codes;
    const float* weight_scale;  // int8: (N,), int4: (N, groups)
    const float* bias;
    const float* input_scale;
    int64_t rows, out_features, columns, groups, group_size;
    int32_t x_type, y_type, steps, activation, row_parts, panel_parts;
};

EXPORT int dsc_test_has_amx() { return has_amx_int8(); }

// Packs and multiplies in row_parts x panel_parts pieces. 0, or 1 where something was written out of bounds.
EXPORT int dsc_test_linear(int which, const Arguments* a) {
    const LinearKernels& kernels = *table_of(which);
    const bool int4 = a->group_size > 0;
    LinearWeight weight{nullptr, a->out_features, a->columns, a->groups, a->group_size};
    Guarded packed(packed_bytes(a->out_features, a->columns, int4 ? 4 : 8, a->groups));
    Guarded scratch(kernels.scratch_bytes(a->columns, a->groups));
    uint8_t* body = packed.begin() + sizeof(PackedHeader);
    const int64_t panels = (a->out_features + kernels.panel_columns - 1) / kernels.panel_columns;
    for (int64_t panel = 0; panel < panels; panel++) {
        const Range one{panel, panel + 1};
        if (int4)
            kernels.int4_pack(a->codes, a->weight_scale, weight, one, body);
        else
            kernels.int8_pack(a->codes, weight, one, scratch.begin(), body);
    }
    weight.body = body;
    const LinearCall call{a->x,
                          static_cast<LinearType>(a->x_type),
                          a->rows,
                          weight,
                          int4 ? nullptr : a->weight_scale,
                          a->bias,
                          a->input_scale,
                          a->steps,
                          static_cast<Activation>(a->activation),
                          a->y,
                          static_cast<LinearType>(a->y_type)};
    for (int64_t i = 0; i < a->row_parts; i++)
        for (int64_t j = 0; j < a->panel_parts; j++) {
            const Range rows{a->rows * i / a->row_parts, a->rows * (i + 1) / a->row_parts};
            const Range part{panels * j / a->panel_parts, panels * (j + 1) / a->panel_parts};
            (int4 ? kernels.int4_linear : kernels.int8_linear)(call, rows, part, scratch.begin());
        }
    return packed.intact() && scratch.intact() ? 0 : 1;
}

// Whether quantizing and packing at once gives the bytes that packing `codes` gives.
EXPORT int dsc_test_quantize_pack(int which, const void* values, int type, const float* scale, int per_row, int steps,
                                  const int8_t* codes, int64_t rows, int64_t columns) {
    const LinearKernels& kernels = *table_of(which);
    const LinearWeight weight{nullptr, rows, columns, 0, 0};
    const Range all{0, (rows + kernels.panel_columns - 1) / kernels.panel_columns};
    const int64_t bytes = packed_bytes(rows, columns, 8, 0);
    Guarded expected(bytes), packed(bytes), scratch(kernels.scratch_bytes(columns, 0));
    kernels.int8_pack(codes, weight, all, scratch.begin(), expected.begin());
    kernels.int8_quantize_pack(values, static_cast<LinearType>(type), scale, per_row != 0, steps, weight, all,
                               scratch.begin(), packed.begin());
    return packed.intact() && scratch.intact() && std::memcmp(expected.begin(), packed.begin(), bytes) == 0;
}
