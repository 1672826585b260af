// Bit-packed masks on elements of 2, 4 or 8 bytes: of one tensor, or of many in one launch.
#pragma once

#include "grid.cuh"

namespace ds_compress::elementwise {

/// `count` (up to 8) bits from bit `bit` of `packed` on, in the low bits; reads no byte that it does not need.
DSC_DEVICE unsigned bits_at(const uint8_t* packed, int64_t bit, int count) {
    const int shift = static_cast<int>(bit & 7);
    unsigned bits = packed[bit >> 3];
    if (shift + count > 8) bits |= static_cast<unsigned>(packed[(bit >> 3) + 1]) << 8;
    return (bits >> shift) & ((1u << count) - 1u);
}

/// A tensor and its mask, as whole vectors of 16 bytes behind a head and before a tail of single elements.
struct Governed {
    char* vectors;          // the first
    const uint8_t* octets;  // the byte with the bit of its first element
    int64_t count;          // of vectors
    uint8_t shift;          // place of that bit
    uint8_t head, tail;     // elements
};

/// `count` elements at `data`, whose bits begin with `bit`.
template <class T>
inline Governed governed(void* data, const uint8_t* packed, int64_t bit, int64_t count) {
    constexpr int64_t width = Vector<T>::count;
    const int64_t ahead = static_cast<int64_t>((0 - reinterpret_cast<uintptr_t>(data)) % 16 / sizeof(T));
    const int64_t head = ahead < count ? ahead : count;
    return {static_cast<char*>(data) + head * static_cast<int64_t>(sizeof(T)),
            packed + ((bit + head) >> 3),
            (count - head) / width,
            static_cast<uint8_t>((bit + head) & 7),
            static_cast<uint8_t>(head),
            static_cast<uint8_t>((count - head) % width)};
}

/// Up to `capacity` tensors, and for each how many tiles of a block there are up to its end.
template <int capacity>
struct Tensors {
    Governed each[capacity];
    int64_t tiles[capacity];
};

constexpr int tile_vectors = threads * unroll;

/// Replaces the elements of a vector whose bit is cleared by `fill`, of which a word has as many as it holds; returns
/// whether anything changed.
template <class T>
DSC_DEVICE bool mask_vector(uint4& vector, unsigned bits, uint2 fill) {
    uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w}, changed = 0;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        constexpr int per_word = sizeof(T) == 2 ? 2 : 1;
        const int element = sizeof(T) == 8 ? w / 2 : w * per_word;
        // Bit i of a nibble becomes the sign of byte i.
        const uint32_t signs = (bits >> (element / 4 * 4) & 15u) * 0x10204080u;
        const uint32_t mine = 0x8888u + 0x1111u * (element % 4);
        const uint32_t kept = permute(signs, per_word == 2 ? mine + 0x1100u : mine);
        const uint32_t masked = (words[w] & kept) | ((sizeof(T) == 8 && w % 2 == 1 ? fill.y : fill.x) & ~kept);
        changed |= masked ^ words[w];
        words[w] = masked;
    }
    vector = make_uint4(words[0], words[1], words[2], words[3]);
    return changed != 0;
}

/// `full`: all vectors of the tile are there, else the `left` first.
template <class T, bool full>
DSC_DEVICE void mask_tile(const Governed& tensor, int64_t tile, int left, uint2 fill) {
    constexpr int width = Vector<T>::count;
    const int thread = static_cast<int>(threadIdx.x);
    char* const first = tensor.vectors + (tile * tile_vectors + thread) * 16;
    const int bit = tensor.shift + thread * width, shift = bit & 7;
    const uint8_t* const octets = tensor.octets + tile * (tile_vectors * width / 8) + (bit >> 3);
    const bool straddles = shift + width > 8;
    uint4 vectors[unroll];
    unsigned bits[unroll];
#pragma unroll
    for (int u = 0; u < unroll; u++) {
        if (!full && u * threads + thread >= left) continue;
        vectors[u] = load_wide<uint4>(first + u * threads * 16);
        bits[u] = octets[u * (threads * width / 8)];
        if (straddles) bits[u] |= static_cast<unsigned>(octets[u * (threads * width / 8) + 1]) << 8;
    }
#pragma unroll
    for (int u = 0; u < unroll; u++) {
        if (!full && u * threads + thread >= left) continue;
        // Under a mask that was applied before, nothing is written.
        if (mask_vector<T>(vectors[u], bits[u] >> shift, fill)) store_wide(first + u * threads * 16, vectors[u]);
    }
}

/// The head and the tail.
template <class T>
DSC_DEVICE void mask_singles(const Governed& tensor, T fill) {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= tensor.head + tensor.tail) return;
    const int64_t element = i < tensor.head ? i - tensor.head : tensor.count * Vector<T>::count + i - tensor.head;
    T* const place = reinterpret_cast<T*>(tensor.vectors) + element;
    const int64_t bit = tensor.shift + element;  // before the first vector: negative
    if ((tensor.octets[bit >> 3] >> (bit & 7) & 1) == 0) *place = fill;
}

/// A block for every tile. fill: the pattern of an element, in as many as a word holds, or in two words.
template <class T, int capacity>
__global__ void __launch_bounds__(threads) mask_apply_kernel(Tensors<capacity> tensors, uint2 fill) {
    const int64_t tile = blockIdx.x;
    int which = 0;
#pragma unroll
    for (int step = capacity / 2; step > 0; step /= 2)
        if (tile >= tensors.tiles[which + step - 1]) which += step;
    const Governed& tensor = tensors.each[which];
    const int64_t own = which == 0 ? tile : tile - tensors.tiles[which - 1];
    const int64_t left = tensor.count - own * tile_vectors;
    if (left >= tile_vectors)
        mask_tile<T, true>(tensor, own, tile_vectors, fill);
    else
        mask_tile<T, false>(tensor, own, static_cast<int>(left), fill);
    if (own == 0) {
        T one;
        memcpy(&one, &fill, sizeof one);
        mask_singles<T>(tensor, one);
    }
}

/// The four low bits of each byte of a word that is not zero.
DSC_DEVICE unsigned nibble_of(unsigned word) {
    const unsigned set = ((((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) & 0x80808080u) >> 7;
    return (set * 0x01020408u) >> 24 & 15u;
}

DSC_DEVICE unsigned byte_of(const uint8_t* mask, int64_t first, int64_t count) {
    unsigned bits = 0;
    for (int j = 0; j < 8 && first + j < count; j++)
        if (mask[first + j] != 0) bits |= 1u << j;
    return bits;
}

/// A thread makes two bytes of sixteen elements, several times over. `packed` is fresh, so aligned.
__global__ void __launch_bounds__(threads)
    mask_pack_kernel(const uint8_t* __restrict__ mask, int64_t count, uint8_t* __restrict__ packed) {
    const bool aligned = is_aligned(mask);
    const int64_t vectors = aligned ? count / 16 : 0;
    for (int64_t begin = static_cast<int64_t>(blockIdx.x) * threads * unroll; begin < vectors;
         begin += static_cast<int64_t>(gridDim.x) * threads * unroll) {
        uint4 words[unroll];
#pragma unroll
        for (int u = 0; u < unroll; u++) {
            const int64_t i = begin + u * threads + threadIdx.x;
            if (i < vectors) words[u] = load_passing<uint4>(mask + 16 * i);
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
        packed[i] = static_cast<uint8_t>(byte_of(mask, i * 8, count));
}

/// Four bits as four bytes.
DSC_DEVICE unsigned spread(unsigned nibble) { return (nibble * 0x00204081u) & 0x01010101u; }

/// A thread writes sixteen bytes, several times over. `mask` is fresh, so aligned.
__global__ void __launch_bounds__(threads)
    mask_unpack_kernel(const uint8_t* __restrict__ packed, int64_t bit, int64_t count, uint8_t* __restrict__ mask) {
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
            store_wide(mask + 16 * i, make_uint4(spread(mine & 15u), spread(mine >> 4 & 15u), spread(mine >> 8 & 15u),
                                                 spread(mine >> 12 & 15u)));
        }
    }
    for (int64_t i = 16 * vectors + first_item(); i < count; i += stride())
        mask[i] = static_cast<uint8_t>(bits_at(packed, bit + i, 1));
}

}  // namespace ds_compress::elementwise
