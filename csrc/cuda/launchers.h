// Every CUDA launcher, for the bindings: plain C, device pointers, no torch. A launcher enqueues on `stream` and
// returns the launch's error; it never synchronises and allocates nothing.
#pragma once

#include <stdint.h>

#if !defined(DSC_EMULATOR)
#include <cuda_runtime_api.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

// --- linear --------------------------------------------------------------------------------------------------------

enum DscDtype { dsc_float32 = 0, dsc_bfloat16 = 1, dsc_float16 = 2 };
enum DscActivation { dsc_none = 0, dsc_relu = 1, dsc_gelu_erf = 2, dsc_gelu_tanh = 3, dsc_silu = 4 };

// Rows of activations as int8: x (rows, columns) -> quantized (rows, columns rounded up to 16, zeros beyond) and the
// fp32 scale of every row. `given_scale`: one fp32 value for all rows, or null: measured row by row. steps: 127
// (values +-127) or 128 (values -128 .. 127). A row with a NaN (measured: or Inf) has scale NaN and quantized values 0.
cudaError_t dsc_quantize_rows(const void* x, int dtype, const float* given_scale, int64_t rows, int64_t columns,
                              int steps, int8_t* quantized, float* scales, cudaStream_t stream);

// Packed weights: the header of ds_compress/packed.h, then one of the layouts of csrc/cuda/linear/packed.cuh (ids 16
// and 17), which fit into `packed_bytes`.
cudaError_t dsc_int8_pack(const int8_t* quantized, int64_t n, int64_t k, void* packed, cudaStream_t stream);
cudaError_t dsc_int8_quantize_pack(const void* weight, int dtype, const float* scale, int one_scale, int64_t n,
                                   int64_t k, int steps, void* packed, cudaStream_t stream);
cudaError_t dsc_int4_pack(const int8_t* quantized, const float* scale, int64_t n, int64_t k, int group, void* packed,
                          cudaStream_t stream);

// out (m, n) = activation(dequantized product + bias); quantized values and input_scale from dsc_quantize_rows, bias
// fp32 (n,) or null. Any m, n, k; group: 32, 64 or 128.
cudaError_t dsc_int8_linear(const int8_t* quantized, const float* input_scale, const void* packed,
                            const float* weight_scale, const float* bias, void* out, int out_dtype, int activation,
                            int64_t m, int64_t n, int64_t k, cudaStream_t stream);
cudaError_t dsc_int4_linear(const int8_t* quantized, const float* input_scale, const void* packed, const float* bias,
                            void* out, int out_dtype, int activation, int64_t m, int64_t n, int64_t k, int group,
                            cudaStream_t stream);
// The same of x itself, (m, k) of `dtype`, in one launch, where dsc_quantizes_itself(m, k); given_scale, steps: as
// dsc_quantize_rows.
int dsc_quantizes_itself(int64_t m, int64_t k);
cudaError_t dsc_int8_linear_of(const void* x, int dtype, const float* given_scale, int steps, const void* packed,
                               const float* weight_scale, const float* bias, void* out, int out_dtype, int activation,
                               int64_t m, int64_t n, int64_t k, cudaStream_t stream);
cudaError_t dsc_int4_linear_of(const void* x, int dtype, const float* given_scale, int steps, const void* packed,
                               const float* bias, void* out, int out_dtype, int activation, int64_t m, int64_t n,
                               int64_t k, int group, cudaStream_t stream);

// The same for the rows of several experts at once, without activation. Expert e has the rows from offsets[e - 1] (0
// for the first) to offsets[e], int32 or, if `wide`, int64 on the device; where these decrease or go beyond `m` they
// are clamped. packed: a weight for each expert, `expert_bytes` apart, a multiple of 16; weight_scale, bias: (experts,
// n); given_scales: (experts,). Rows behind those of the last expert give 0.
cudaError_t dsc_quantize_expert_rows(const void* x, int dtype, const float* given_scales, const void* offsets, int wide,
                                     int64_t experts, int64_t rows, int64_t columns, int steps, int8_t* quantized,
                                     float* scales, cudaStream_t stream);
cudaError_t dsc_int8_grouped_linear(const int8_t* quantized, const float* input_scale, const void* packed,
                                    int64_t expert_bytes, const float* weight_scale, const float* bias,
                                    const void* offsets, int wide, int64_t experts, void* out, int out_dtype, int64_t m,
                                    int64_t n, int64_t k, cudaStream_t stream);
cudaError_t dsc_int4_grouped_linear(const int8_t* quantized, const float* input_scale, const void* packed,
                                    int64_t expert_bytes, const float* bias, const void* offsets, int wide,
                                    int64_t experts, void* out, int out_dtype, int64_t m, int64_t n, int64_t k,
                                    int group, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
