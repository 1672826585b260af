// Bit-packed masks on elements of 2, 4 or 8 bytes: of one tensor, or of many in one launch.
#pragma once

#include "grid.cuh"

#ifndef DSC_MASK_WRITE
#define DSC_MASK_WRITE 0
#endif

namespace ds_compress::elementwise {

/// `count` (up to 8) bits from bit `bit` of `packed` on, in the low bits; reads no byte that it does not need.
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

/// A tensor and its mask: element i is governed by bit `bit` + i.
struct Governed {
    void* data;
    const uint8_t* packed;
    int64_t bit, count;
};

/// Up to `capacity` tensors, and for each how many tiles of a block there are up to its end.
template <int capacity>
struct Tensors {
    Governed each[capacity];
    int64_t tiles[capacity];
};

template <class T>
constexpr int64_t tile_elements = static_cast<int64_t>(threads) * unroll * Vector<T>::count;

/// Elements before the first 16-byte boundary are the head; whole vectors follow, then single elements again. The first
/// tile of a tensor also has the single ones.
template <class T, bool counts>
DSC_DEVICE unsigned mask_tile(const Governed& tensor, int64_t tile, T fill) {
    constexpr int width = Vector<T>::count;
    T* const data = static_cast<T*>(tensor.data);
    const int ahead = static_cast<int>((0 - reinterpret_cast<uintptr_t>(data)) % 16 / sizeof(T));
    const int64_t head = ahead < tensor.count ? ahead : tensor.count;
    const int64_t vectors = (tensor.count - head) / width;
    const int64_t before = tile * threads * unroll;
    unsigned found = 0;
    if (before < vectors) {
        const int left = static_cast<int>(vectors - before < threads * unroll ? vectors - before : threads * unroll);
        T* const first = data + head + before * width;
        const int64_t first_bit = tensor.bit + head + before * width;
        const uint8_t* const octets = tensor.packed + (first_bit >> 3);
        Vector<T> vectors_here[unroll];
        unsigned bits[unroll];
#pragma unroll
        for (int u = 0; u < unroll; u++) {
            const int i = u * threads + static_cast<int>(threadIdx.x);
            if (i >= left) continue;
            vectors_here[u] = load_vector(first + i * width);
            bits[u] = bits_at(octets, (first_bit & 7) + i * width, width);
        }
#pragma unroll
        for (int u = 0; u < unroll; u++) {
            const int i = u * threads + static_cast<int>(threadIdx.x);
            bool changed = false;
            if (i < left) {
#pragma unroll
                for (int j = 0; j < width; j++) {
                    T& value = vectors_here[u].values[j];
                    const bool is_lost = !(bits[u] >> j & 1u);
                    changed = changed || (is_lost && value != fill);
                    if (is_lost) value = fill;
                    if (counts) found += is_not_zero(value);
                }
            }
            // Under a mask that was applied before, nothing is written.
#if DSC_MASK_WRITE == 1
            changed = i < left && __any_sync(~0u, changed);
#elif DSC_MASK_WRITE == 2
            changed = i < left;
#endif
            if (changed) store_vector(first + i * width, vectors_here[u]);
        }
    }
    if (tile == 0) {
        const int singles = static_cast<int>(head + (tensor.count - head) % width);
        const int i = static_cast<int>(threadIdx.x);
        if (i < singles) {
            const int64_t element = i < head ? i : vectors * width + i;
            if (!bits_at(tensor.packed, tensor.bit + element, 1)) data[element] = fill;
            if (counts) found += is_not_zero(data[element]);
        }
    }
    return found;
}

template <class T, bool counts, int capacity>
__global__ void __launch_bounds__(threads)
    mask_apply_kernel(Tensors<capacity> tensors, T fill, unsigned long long* __restrict__ non_zero) {
    unsigned found = 0;
    for (int64_t tile = blockIdx.x; tile < tensors.tiles[capacity - 1]; tile += gridDim.x) {
        int which = 0;
#pragma unroll
        for (int step = capacity / 2; step > 0; step /= 2)
            if (tile >= tensors.tiles[which + step - 1]) which += step;
        const int64_t before = which == 0 ? 0 : tensors.tiles[which - 1];
        found += mask_tile<T, counts>(tensors.each[which], tile - before, fill);
    }
    if (counts) {
        found = __reduce_add_sync(~0u, found);
        if (threadIdx.x % 32 == 0 && found != 0) atomicAdd(non_zero, static_cast<unsigned long long>(found));
    }
}

/// The four low bits of each byte of a word that is not zero.
DSC_DEVICE unsigned nibble_of(unsigned word) {
    const unsigned set = ((((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) & 0x80808080u) >> 7;
    return (set * 0x01020408u) >> 24 & 15u;
}

DSC_DEVICE unsigned byte_of(const uint8_t* keep, int64_t first, int64_t count) {
    unsigned bits = 0;
    for (int j = 0; j < 8 && first + j < count; j++)
        if (keep[first + j] != 0) bits |= 1u << j;
    return bits;
}

/// A thread makes two bytes of sixteen elements, several times over. `packed` is fresh, so aligned.
__global__ void __launch_bounds__(threads)
    mask_pack_kernel(const uint8_t* __restrict__ keep, int64_t count, uint8_t* __restrict__ packed) {
    const bool aligned = is_aligned(keep);
    const int64_t vectors = aligned ? count / 16 : 0;
    for (int64_t begin = static_cast<int64_t>(blockIdx.x) * threads * unroll; begin < vectors;
         begin += static_cast<int64_t>(gridDim.x) * threads * unroll) {
        uint4 words[unroll];
#pragma unroll
        for (int u = 0; u < unroll; u++) {
            const int64_t i = begin + u * threads + threadIdx.x;
            if (i < vectors) words[u] = load_wide<uint4>(keep + 16 * i);
        }
#pragma unroll
        for (int u = 0; u < unroll; u++) {
            const int64_t i = begin + u * threads + threadIdx.x;
            if (i < vectors)
                *reinterpret_cast<uint16_t*>(packed + 2 * i) =
                    static_cast<uint16_t>(nibble_of(words[u].x) | nibble_of(words[u].y) << 4 |
                                          nibble_of(words[u].z) << 8 | nibble_of(words[u].w) << 12);
        }
    }
    for (int64_t i = 2 * vectors + first_item(); i * 8 < count; i += stride())
        packed[i] = static_cast<uint8_t>(byte_of(keep, i * 8, count));
}

/// Four bits as four bytes.
DSC_DEVICE unsigned spread(unsigned nibble) { return (nibble * 0x00204081u) & 0x01010101u; }

/// A thread writes sixteen bytes, several times over. `keep` is fresh, so aligned.
__global__ void __launch_bounds__(threads)
    mask_unpack_kernel(const uint8_t* __restrict__ packed, int64_t bit, int64_t count, uint8_t* __restrict__ keep) {
    const int64_t vectors = count / 16;
    const int shift = static_cast<int>(bit & 7);
    const uint8_t* const octets = packed + (bit >> 3);
    for (int64_t begin = static_cast<int64_t>(blockIdx.x) * threads * unroll; begin < vectors;
         begin += static_cast<int64_t>(gridDim.x) * threads * unroll) {
        unsigned bits[unroll];
#pragma unroll
        for (int u = 0; u < unroll; u++) {
            const int64_t i = begin + u * threads + threadIdx.x;
            if (i >= vectors) continue;
            bits[u] = octets[2 * i] | static_cast<unsigned>(octets[2 * i + 1]) << 8;
            if (shift != 0) bits[u] |= static_cast<unsigned>(octets[2 * i + 2]) << 16;
        }
#pragma unroll
        for (int u = 0; u < unroll; u++) {
            const int64_t i = begin + u * threads + threadIdx.x;
            if (i >= vectors) continue;
            const unsigned mine = bits[u] >> shift;
            store_wide(keep + 16 * i, make_uint4(spread(mine & 15u), spread(mine >> 4 & 15u), spread(mine >> 8 & 15u),
                                                 spread(mine >> 12 & 15u)));
        }
    }
    for (int64_t i = 16 * vectors + first_item(); i < count; i += stride())
        keep[i] = static_cast<uint8_t>(bits_at(packed, bit + i, 1));
}

}  // namespace ds_compress::elementwise
