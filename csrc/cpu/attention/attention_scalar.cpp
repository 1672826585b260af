// For every CPU: vectors of 16 bytes, as SSE2 and NEON have them.
#include "kernel.h"

const ds_compress::cpu::AttentionKernel* ds_compress::cpu::attention_scalar() { return &kAttention; }
