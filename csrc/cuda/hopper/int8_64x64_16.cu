#include "instances.cuh"

cudaError_t ds_compress::hopper::int8_64x64_16(const DscProduct& product, cudaStream_t stream) {
    return Int8Product<cutlass::bfloat16_t, Shape<_64, _64, _128>, Shape<_1, _1, _1>>::run(product, stream);
}
