// Compiled with -mavx512f and its relatives BW, DQ and VL.
#include "kernels.h"

#if defined(__AVX512F__)
// gcc 12 warns about its own intrinsics headers (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "table.h"

const ds_compress::cpu::ElementwiseKernels* ds_compress::cpu::elementwise_avx512() { return &kTable; }
#else
const ds_compress::cpu::ElementwiseKernels* ds_compress::cpu::elementwise_avx512() { return nullptr; }
#endif
