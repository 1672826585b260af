// Compiled with -mavx2 -mfma -mf16c.
#include "kernels.h"

#if defined(__AVX2__)
#include "table.h"

const ds_compress::cpu::ElementwiseKernels* ds_compress::cpu::elementwise_avx2() { return &kTable; }
#else
const ds_compress::cpu::ElementwiseKernels* ds_compress::cpu::elementwise_avx2() { return nullptr; }
#endif
