// Where things lie in a packed weight on CUDA. All rows are output features; all parts begin on 16 bytes.
//
// int8   n rows of k quantized values, each padded with zeros to a multiple of 16 bytes.
// int4   n rows of 16-byte runs; a run holds 32 values: byte 4t + i has value 4t + i in its low and value
//        16 + 4t + i in its high nibble, so that word t unpacks to the two registers that thread t of a quad
//        feeds to mma. Then the fp32 scales, group by group: (groups, n padded to 8).
#pragma once

#include "ds_compress/device.h"
#include "ds_compress/packed.h"

namespace ds_compress::linear {

enum CudaLayout : int64_t { kLayoutCudaInt8 = 16, kLayoutCudaInt4 = 17 };

constexpr int64_t header_bytes = sizeof(PackedHeader);

// `round_up` of packed.h, which is for the host alone.
__host__ __device__ constexpr int64_t rounded_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

__host__ __device__ constexpr int64_t int8_row_bytes(int64_t k) { return rounded_up(k, 16); }
__host__ __device__ constexpr int64_t int4_row_bytes(int64_t k) { return rounded_up(k, 32) / 2; }
__host__ __device__ constexpr int64_t int4_scale_stride(int64_t n) { return rounded_up(n, 8); }

DSC_DEVICE const int8_t* packed_body(const void* packed) { return static_cast<const int8_t*>(packed) + header_bytes; }
DSC_DEVICE const float* int4_scales(const void* packed, int64_t n, int64_t k) {
    return reinterpret_cast<const float*>(packed_body(packed) + n * int4_row_bytes(k));
}

}  // namespace ds_compress::linear
