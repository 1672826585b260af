// The CUDA launchers of the elementwise ops, for the bindings; as ../launchers.h: plain C, device pointers, no torch,
// nothing allocated. Pointers are aligned to their elements, no more. The formulas and the layouts of payloads and
// masks are those of ds_compress/ops/reference.
#pragma once

#include "../launchers.h"

#ifdef __cplusplus
extern "C" {
#endif

// --- masks: element i is governed by bit `bit` + i of `packed` -----------------------------------------------------

// data: `count` elements of 2, 4 or 8 bytes; those whose bit is cleared become `fill`, a bit pattern.
cudaError_t dsc_mask_apply(void* data, int element_size, int64_t count, const uint8_t* packed, int64_t bit,
                           uint64_t fill, cudaStream_t stream);
// `tensor_count` tensors of one element size, in one launch for every 256. The arrays lie on the host and are read
// here.
cudaError_t dsc_mask_apply_many(void* const* data, const uint8_t* const* packed, const int64_t* bits,
                                const int64_t* counts, int64_t tensor_count, int element_size, uint64_t fill,
                                cudaStream_t stream);
// mask and, below, scores may begin anywhere; what is written begins at a multiple of 16 bytes.
cudaError_t dsc_mask_pack(const uint8_t* mask, int64_t count, uint8_t* packed, cudaStream_t stream);
cudaError_t dsc_mask_unpack(const uint8_t* packed, int64_t bit, int64_t count, uint8_t* mask, cudaStream_t stream);
cudaError_t dsc_mask_n_of_m(const float* scores, int64_t rows, int64_t columns, int64_t n, int64_t m, uint8_t* packed,
                            cudaStream_t stream);

// --- fake quantization of rows -------------------------------------------------------------------------------------

// x, y (rows, columns). scale, offset: fp32 (ranges,), ranges = rows or 1; read when `given`, else ranges = rows and
// they are measured and written. offset null: symmetric. mask: null, or ceil(rows * columns / 8) bytes.
cudaError_t dsc_fake_quantize(const void* x, void* y, int dtype, int64_t rows, int64_t columns, int given,
                              int64_t ranges, float* scale, float* offset, int quant_min, int quant_max, int steps,
                              uint8_t* mask, cudaStream_t stream);

// The same to small floats, of `blocks` blocks of x and y that lie one after the other. scale: fp32 (scales,), scales =
// blocks or 1; read when `given`, else scales = blocks and they are chosen and written. global_scale: null, or one fp32
// number for chosen scales of kind 2. mask: null, or ceil(blocks * block / 8) bytes.
cudaError_t dsc_fake_quantize_float(const void* x, void* y, int dtype, int64_t blocks, int64_t block, int given,
                                    int64_t scales, float* scale, const float* global_scale, int exponent_bits,
                                    int mantissa_bits, float largest, int scale_kind, uint8_t* mask,
                                    cudaStream_t stream);

// --- payloads of a quantized reduction; bits 8 or 4, block a multiple of 32 up to 8192 -----------------------------

cudaError_t dsc_block_quantize(const void* x, int dtype, int64_t numel, float* residual, uint8_t* payloads,
                               int64_t payload_count, int64_t chunk, int bits, int block, cudaStream_t stream);
cudaError_t dsc_block_dequantize(const uint8_t* payloads, int64_t payload_count, int64_t chunk, int bits, int block,
                                 void* out, int dtype, int64_t numel, cudaStream_t stream);
cudaError_t dsc_block_reduce(const uint8_t* payloads, int64_t payload_count, int64_t numel, int bits, int block,
                             float multiplier, float* out, cudaStream_t stream);
cudaError_t dsc_block_reduce_quantize(const uint8_t* payloads, int64_t payload_count, int64_t numel, int bits,
                                      int block, float multiplier, float* residual, uint8_t* payload,
                                      cudaStream_t stream);

#ifdef __cplusplus
}
#endif
