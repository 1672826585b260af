#include "mask.cuh"

#include "launchers.h"
#include "select.cuh"

namespace ds_compress::elementwise {

struct Masked {
    void* data;
    const uint8_t* packed;
    int64_t bit, count;
};

/// One launch for up to `capacity` tensors of one element size.
template <class T, int capacity>
static cudaError_t mask_apply(const Masked* each, int64_t tensor_count, uint64_t fill, cudaStream_t stream) {
    Tensors<capacity> tensors = {};
    int64_t tiles = 0;
    for (int i = 0; i < capacity; i++) {
        if (i < tensor_count && each[i].count > 0) {
            tensors.each[i] = governed<T>(each[i].data, each[i].packed, each[i].bit, each[i].count);
            tiles += tensors.each[i].count > 0 ? (tensors.each[i].count + tile_vectors - 1) / tile_vectors : 1;
        }
        tensors.tiles[i] = tiles;
    }
    const auto low = static_cast<uint32_t>(fill);
    const uint2 words =
        make_uint2(sizeof(T) == 2 ? low << 16 | (low & 0xffffu) : low, static_cast<uint32_t>(fill >> 32));
    return launch(mask_apply_kernel<T, capacity>, blocks_for(tiles, 1), threads, 0, stream, tensors, words);
}

template <int capacity>
static cudaError_t mask_apply_sized(const Masked* each, int64_t tensor_count, int element_size, uint64_t fill,
                                    cudaStream_t stream) {
    switch (element_size) {
        case 2:
            return mask_apply<uint16_t, capacity>(each, tensor_count, fill, stream);
        case 4:
            return mask_apply<uint32_t, capacity>(each, tensor_count, fill, stream);
        case 8:
            return mask_apply<uint64_t, capacity>(each, tensor_count, fill, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace ds_compress::elementwise

using namespace ds_compress;
using namespace ds_compress::elementwise;

extern "C" cudaError_t dsc_mask_apply(void* data, int element_size, int64_t count, const uint8_t* packed, int64_t bit,
                                      uint64_t fill, cudaStream_t stream) {
    const Masked one = {data, packed, bit, count};
    return mask_apply_sized<4>(&one, 1, element_size, fill, stream);
}

extern "C" cudaError_t dsc_mask_apply_many(void* const* data, const uint8_t* const* packed, const int64_t* bits,
                                           const int64_t* counts, int64_t tensor_count, int element_size, uint64_t fill,
                                           cudaStream_t stream) {
    constexpr int most = 256;  // of which the addresses fit into the parameters of a launch
    for (int64_t first = 0; first < tensor_count; first += most) {
        Masked each[most];
        const int64_t count = tensor_count - first < most ? tensor_count - first : most;
        for (int64_t i = 0; i < count; i++)
            each[i] = {data[first + i], packed[first + i], bits[first + i], counts[first + i]};
        const cudaError_t error = count <= 4 ? mask_apply_sized<4>(each, count, element_size, fill, stream)
                                             : mask_apply_sized<most>(each, count, element_size, fill, stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

extern "C" cudaError_t dsc_mask_pack(const uint8_t* mask, int64_t count, uint8_t* packed, cudaStream_t stream) {
    return launch(mask_pack_kernel, blocks_for((count + 15) / 16, threads * unroll), threads, 0, stream, mask, count,
                  packed);
}

extern "C" cudaError_t dsc_mask_unpack(const uint8_t* packed, int64_t bit, int64_t count, uint8_t* mask,
                                       cudaStream_t stream) {
    return launch(mask_unpack_kernel, blocks_for((count + 15) / 16, threads * unroll), threads, 0, stream, packed, bit,
                  count, mask);
}

extern "C" cudaError_t dsc_mask_n_of_m(const float* scores, int64_t rows, int64_t columns, int64_t n, int64_t m,
                                       uint8_t* packed, cudaStream_t stream) {
    const int64_t count = rows * columns;
    if (columns % 8 == 0 && reinterpret_cast<uintptr_t>(scores) % 16 == 0) {  // no run crosses a thread's eight
        const auto kernel = m == 2   ? mask_runs_kernel<2>
                            : m == 4 ? mask_runs_kernel<4>
                            : m == 8 ? mask_runs_kernel<8>
                                     : nullptr;
        if (kernel != nullptr)
            return launch(kernel, blocks_for(count / 8, threads * 2), threads, 0, stream, scores, count,
                          static_cast<int>(n), packed);
    }
    return launch(mask_n_of_m_kernel, blocks_for((count + 7) / 8, threads, 16), threads, 0, stream, scores, rows,
                  columns, n, m, packed);
}
