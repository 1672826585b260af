// For every CPU: vectors of 16 bytes, as SSE2 and NEON have them.
#include "table.h"

const ds_compress::cpu::ElementwiseKernels* ds_compress::cpu::elementwise_scalar() { return &kTable; }
