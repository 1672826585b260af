#include "instances.cuh"

cudaError_t ds_compress::hopper::int8_128x128_32(const DscProduct& product, cudaStream_t stream) {
    return Int8Product<float, Shape<_128, _128, _128>, Shape<_2, _1, _1>>::run(product, stream);
}
