#include "mask.cuh"

#include "launchers.h"
#include "select.cuh"

namespace ds_compress::elementwise {

template <class T, bool counts>
static cudaError_t mask_apply(void* data, int64_t count, const uint8_t* packed, int64_t bit, uint64_t fill,
                              int64_t* non_zero, cudaStream_t stream) {
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T));
    const int64_t ahead = misaligned == 0 ? 0 : Vector<T>::count - misaligned;
    return launch(mask_apply_kernel<T, counts>, blocks_for((count + Vector<T>::count - 1) / Vector<T>::count), threads, 0,
                  stream, static_cast<T*>(data), count, ahead < count ? ahead : count, packed, bit,
                  static_cast<T>(fill), reinterpret_cast<unsigned long long*>(non_zero));
}

template <bool counts>
static cudaError_t mask_apply_sized(void* data, int element_size, int64_t count, const uint8_t* packed, int64_t bit,
                                    uint64_t fill, int64_t* non_zero, cudaStream_t stream) {
    switch (element_size) {
        case 2:
            return mask_apply<uint16_t, counts>(data, count, packed, bit, fill, non_zero, stream);
        case 4:
            return mask_apply<uint32_t, counts>(data, count, packed, bit, fill, non_zero, stream);
        case 8:
            return mask_apply<uint64_t, counts>(data, count, packed, bit, fill, non_zero, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

template <class T>
static cudaError_t histogram(const void* values, int64_t count, int shift, int bins, int prefix_shift,
                             unsigned prefix, int64_t* counts, cudaStream_t stream) {
    const T* const from = static_cast<const T*>(values);
    auto* const to = reinterpret_cast<unsigned long long*>(counts);
    // Few enough blocks that adding up their histograms costs little.
    const dim3 grid = blocks_for(count, 32 * threads);
    if (bins <= 8192)
        return launch(magnitude_histogram_kernel<T, true>, grid, threads, bins * sizeof(unsigned), stream, from, count,
                      shift, bins, prefix_shift, prefix, to);
    return launch(magnitude_histogram_kernel<T, false>, grid, threads, 0, stream, from, count, shift, bins,
                  prefix_shift, prefix, to);
}

}  // namespace ds_compress::elementwise

using namespace ds_compress;
using namespace ds_compress::elementwise;

extern "C" cudaError_t dsc_mask_apply(void* data, int element_size, int64_t count, const uint8_t* packed, int64_t bit,
                                      uint64_t fill, cudaStream_t stream) {
    return mask_apply_sized<false>(data, element_size, count, packed, bit, fill, nullptr, stream);
}

extern "C" cudaError_t dsc_mask_apply_count(void* data, int element_size, int64_t count, const uint8_t* packed,
                                            int64_t bit, int64_t* non_zero, cudaStream_t stream) {
    const cudaError_t cleared = cudaMemsetAsync(non_zero, 0, sizeof(int64_t), stream);
    if (cleared != cudaSuccess) return cleared;
    return mask_apply_sized<true>(data, element_size, count, packed, bit, 0, non_zero, stream);
}

extern "C" cudaError_t dsc_mask_pack(const uint8_t* keep, int64_t count, uint8_t* packed, cudaStream_t stream) {
    return launch(mask_pack_kernel, blocks_for((count + 7) / 8), threads, 0, stream, keep, count, packed);
}

extern "C" cudaError_t dsc_mask_unpack(const uint8_t* packed, int64_t bit, int64_t count, uint8_t* keep,
                                       cudaStream_t stream) {
    return launch(mask_unpack_kernel, blocks_for(count), threads, 0, stream, packed, bit, count, keep);
}

extern "C" cudaError_t dsc_mask_n_of_m(const float* scores, int64_t rows, int64_t columns, int64_t n, int64_t m,
                                       uint8_t* packed, cudaStream_t stream) {
    return launch(mask_n_of_m_kernel, blocks_for((rows * columns + 7) / 8), threads, 0, stream, scores, rows, columns, n,
                  m, packed);
}

extern "C" cudaError_t dsc_magnitude_histogram(const void* values, int dtype, int64_t count, int shift, int bins,
                                               int prefix_shift, int64_t prefix, int64_t* counts,
                                               cudaStream_t stream) {
    const cudaError_t cleared = cudaMemsetAsync(counts, 0, bins * sizeof(int64_t), stream);
    if (cleared != cudaSuccess || prefix < 0 || prefix > INT32_MAX) return cleared;  // no magnitude begins like that
    const unsigned wanted = static_cast<unsigned>(prefix);
    switch (dtype) {
        case dsc_float32:
            return histogram<float>(values, count, shift, bins, prefix_shift, wanted, counts, stream);
        case dsc_bfloat16:
            return histogram<__nv_bfloat16>(values, count, shift, bins, prefix_shift, wanted, counts, stream);
        case dsc_float16:
            return histogram<__half>(values, count, shift, bins, prefix_shift, wanted, counts, stream);
        case dsc_float64:
            return histogram<double>(values, count, shift, bins, prefix_shift, wanted, counts, stream);
        default:
            return cudaErrorInvalidValue;
    }
}
