// The tables of weight-only kernels of every instruction set behind a C function, for tests that call each in one
// process.
#include <cstring>
#include <vector>

#include "../../csrc/cpu/weight_only/weight_only.h"

using namespace ds_compress::cpu;

namespace {

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

struct Arguments {
    const void* x;
    void* y;
    const uint8_t* values;
    const float *scale, *offset, *bias;
    int64_t rows, out_features, columns, groups, group_size;
    int32_t x_type, y_type, storage, excess, activation, row_parts, panel_parts;
};

template <class Kernels>
int run(const Kernels& kernels, const Arguments* a) {
    WeightOnlyWeight weight{nullptr,   a->out_features,     a->columns,
                            a->groups, a->group_size,       static_cast<Storage>(a->storage),
                            a->excess, a->offset != nullptr};
    const int64_t panels = weight.panels();
    Guarded packed(panels * weight.panel_bytes());
    Guarded scratch(kernels.scratch_bytes(weight, a->rows));
    for (int64_t panel = 0; panel < panels; panel++)
        weight_only_pack(a->values, a->scale, a->offset, weight, Range{panel, panel + 1}, packed.begin());
    weight.body = packed.begin();
    const WeightOnlyCall call{
        a->x,    static_cast<LinearType>(a->x_type),     a->rows, weight,
        a->bias, static_cast<Activation>(a->activation), a->y,    static_cast<LinearType>(a->y_type)};
    for (int64_t i = 0; i < a->row_parts; i++)
        for (int64_t j = 0; j < a->panel_parts; j++) {
            const Range rows{a->rows * i / a->row_parts, a->rows * (i + 1) / a->row_parts};
            const Range part{panels * j / a->panel_parts, panels * (j + 1) / a->panel_parts};
            kernels.linear(call, rows, part, scratch.begin());
        }
    return packed.intact() && scratch.intact() ? 0 : 1;
}

}  // namespace

// Packs and multiplies in row_parts x panel_parts pieces. 0, or 1 where something was written out of bounds, 2 where
// this CPU has no such kernels.
extern "C" __attribute__((visibility("default"))) int dsc_test_weight_only(int which, const Arguments* a) {
    if (which == 3) return has_amx_bf16() ? run(*weight_only_amx(), a) : 2;
    const WeightOnlyKernels* (*const tables[])() = {weight_only_scalar, weight_only_avx2, weight_only_avx512};
    return run(*tables[which](), a);
}
