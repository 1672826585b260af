// Compiled with -mavx2 -mfma -mf16c.
#include "attention.h"

#if defined(__AVX2__)
#include "kernel.h"

const ds_compress::cpu::AttentionKernel* ds_compress::cpu::attention_avx2() { return &kAttention; }
#else
const ds_compress::cpu::AttentionKernel* ds_compress::cpu::attention_avx2() { return nullptr; }
#endif
