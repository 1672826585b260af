// The products of sm_90a, for the bindings; plain C, as ../launchers.h. They are in the library only where it was built
// with CUTLASS's headers: the symbols are weak, and null without.
#pragma once

#include "../launchers.h"

#ifdef __cplusplus
extern "C" {
#endif

// out (m, n) in out_dtype = activation(quantized . weight^T * (input_scale[m] * weight_scale[n]) + bias[n]).
// quantized (m, pitch), weight (n, pitch): int8 values, zeros beyond the last column, pitch a multiple of 16, both at
// multiples of 16 bytes; bias: or null; out at a multiple of 16 bytes, and so is a row of it.
typedef struct {
    const void* quantized;
    const void* weight;
    const float* input_scale;
    const float* weight_scale;
    const float* bias;
    void* out;
    int out_dtype, activation;
    int64_t m, n, pitch;
    int device, multiprocessors;
} DscProduct;

enum { dsc_hopper_tiles = 3 };

// One of the tiles; `tile` < dsc_hopper_tiles. Nothing is allocated, no workspace is needed.
__attribute__((weak)) cudaError_t dsc_hopper_product(const DscProduct* product, int tile, cudaStream_t stream);
// The tile that is expected to be the fastest for a shape.
__attribute__((weak)) int dsc_hopper_tile(int64_t m, int64_t n, int64_t k, int multiprocessors);

#ifdef __cplusplus
}
#endif
