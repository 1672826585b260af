// The instances, a file each: CUTLASS compiles for half a minute. The last number: bits of an output.
#pragma once

#include "launchers.h"

namespace ds_compress::hopper {

cudaError_t int8_64x64_16(const DscProduct& product, cudaStream_t stream);
cudaError_t int8_64x128_16(const DscProduct& product, cudaStream_t stream);
cudaError_t int8_128x128_16(const DscProduct& product, cudaStream_t stream);
cudaError_t int8_64x64_32(const DscProduct& product, cudaStream_t stream);
cudaError_t int8_128x128_32(const DscProduct& product, cudaStream_t stream);

}  // namespace ds_compress::hopper
