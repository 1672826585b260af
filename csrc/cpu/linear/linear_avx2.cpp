// Compiled with -mavx2 -mfma -mf16c.
#include "linear.h"

#if defined(__AVX2__)
#include "int4_avx2.h"
#include "int8_avx2.h"
#include "table.h"

const ds_compress::cpu::LinearKernels* ds_compress::cpu::linear_avx2() {
    static constexpr LinearKernels kTable =
        table<Int8Driver<Int8Avx2>, Int4Driver<Int4Avx2>>(Isa::avx2, kLayoutInt8Avx2, kLayoutInt4Avx2);
    return &kTable;
}
#else
const ds_compress::cpu::LinearKernels* ds_compress::cpu::linear_avx2() { return nullptr; }
#endif
