// Bit-packed masks on elements of 2, 4 or 8 bytes.
#pragma once

#include "ds_compress/math.h"
#include "grid.cuh"

namespace ds_compress::elementwise {

/// `count` (up to 8) bits from `bit` on; reads no byte that it does not need.
DSC_DEVICE unsigned bits_at(const uint8_t* packed, int64_t bit, int count) {
    const int shift = static_cast<int>(bit & 7);
    unsigned bits = packed[bit >> 3];
    if (shift + count > 8) bits |= static_cast<unsigned>(packed[(bit >> 3) + 1]) << 8;
    return (bits >> shift) & ((1u << count) - 1u);
}

template <class T>
DSC_DEVICE bool is_not_zero(T pattern) {
    return static_cast<T>(pattern << 1) != 0;  // neither of the zeros
}

/// Elements before the first 16-byte boundary are `head`; whole vectors follow, then single elements again.
template <class T, bool counts>
__global__ void __launch_bounds__(threads)
    mask_apply_kernel(T* __restrict__ data, int64_t count, int64_t head, const uint8_t* __restrict__ packed,
                      int64_t bit, T fill, unsigned long long* __restrict__ non_zero) {
    constexpr int width = Vector<T>::count;
    const int64_t vectors = (count - head) / width;
    const int64_t rest = head + vectors * width;
    unsigned found = 0;
    for (int64_t i = first_item(); i < vectors; i += stride()) {
        const int64_t element = head + i * width;
        const unsigned bits = bits_at(packed, bit + element, width);
        Vector<T>* const place = reinterpret_cast<Vector<T>*>(data + element);
        Vector<T> vector = *place;
        bool changed = false;
#pragma unroll
        for (int j = 0; j < width; j++) {
            const T before = vector.values[j];
            if (!(bits >> j & 1u)) vector.values[j] = fill;
            changed = changed || before != vector.values[j];
            if (counts) found += is_not_zero(vector.values[j]);
        }
        if (changed) *place = vector;  // under a mask that was applied before, nothing is written
    }
    for (int64_t i = first_item(); i < head + (count - rest); i += stride()) {
        const int64_t element = i < head ? i : rest + (i - head);
        if (!bits_at(packed, bit + element, 1)) data[element] = fill;
        if (counts) found += is_not_zero(data[element]);
    }
    if (counts) {
        found = __reduce_add_sync(~0u, found);
        if (threadIdx.x % 32 == 0 && found != 0) atomicAdd(non_zero, static_cast<unsigned long long>(found));
    }
}

/// A thread makes one byte.
__global__ void __launch_bounds__(threads)
    mask_pack_kernel(const uint8_t* __restrict__ keep, int64_t count, uint8_t* __restrict__ packed) {
    for (int64_t i = first_item(); i * 8 < count; i += stride()) {
        unsigned bits = 0;
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (i * 8 + j < count && keep[i * 8 + j] != 0) bits |= 1u << j;
        packed[i] = static_cast<uint8_t>(bits);
    }
}

__global__ void __launch_bounds__(threads)
    mask_unpack_kernel(const uint8_t* __restrict__ packed, int64_t bit, int64_t count, uint8_t* __restrict__ keep) {
    for (int64_t i = first_item(); i < count; i += stride())
        keep[i] = static_cast<uint8_t>(bits_at(packed, bit + i, 1));
}

}  // namespace ds_compress::elementwise
