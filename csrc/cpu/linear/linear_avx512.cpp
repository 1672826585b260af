// Compiled with the AVX-512 flags, VNNI among them.
#include "linear.h"

const ds_compress::cpu::LinearKernels* ds_compress::cpu::linear_avx512() { return nullptr; }
