// Compiled with the AVX-512 flags, VNNI among them.
#include "linear.h"

// gcc 12 finds its own intrinsics' "undefined" operands uninitialized.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#if defined(__AVX512VNNI__)
#include "int4_avx512.h"
#include "int8_amx.h"
#include "int8_avx512.h"
#include "table.h"

const ds_compress::cpu::LinearKernels* ds_compress::cpu::linear_avx512() {
    static constexpr LinearKernels kTable =
        table<Int8Driver<Int8Avx512>, Int4Driver<Int4Avx512>>(Isa::avx512, kLayoutInt8Avx512, kLayoutInt4Avx512);
    return &kTable;
}

const ds_compress::cpu::LinearKernels* ds_compress::cpu::linear_amx() {
    static const LinearKernels kTable = [] {
        LinearKernels table = *linear_avx512();
        table.int8_linear = [](const LinearCall& call, Range rows, Range panels, void* scratch) {
            const bool few = rows.end - rows.begin < Int8Amx::kRows;  // not worth the setting up of tiles
            (few ? Int8Driver<Int8Avx512>::linear : Int8Driver<Int8Amx>::linear)(call, rows, panels, scratch);
        };
        return table;
    }();
    return &kTable;
}
#else
const ds_compress::cpu::LinearKernels* ds_compress::cpu::linear_avx512() { return nullptr; }
const ds_compress::cpu::LinearKernels* ds_compress::cpu::linear_amx() { return nullptr; }
#endif
