// Compiled with the AVX-512 flags.
#include "attention.h"

#if defined(__AVX512F__)
// gcc 12 warns about its own intrinsics headers (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "kernel.h"

const ds_compress::cpu::AttentionKernel* ds_compress::cpu::attention_avx512() { return &kAttention; }
#else
const ds_compress::cpu::AttentionKernel* ds_compress::cpu::attention_avx512() { return nullptr; }
#endif
