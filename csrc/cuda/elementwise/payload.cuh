// The values of a payload: their format, the quantized values of one vector, and what a block is quantized from.
#pragma once

#include "grid.cuh"

namespace ds_compress::elementwise {

constexpr int block_threads = 128, block_warps = block_threads / 32;  // of a block of threads

struct Format {
    int block;
    int value_bytes;       // of one block
    int64_t blocks;        // in one payload
    int64_t whole_blocks;  // in a payload whose values are all there
    DSC_DEVICE int64_t payload_bytes() const { return blocks * (4 + value_bytes); }
    DSC_DEVICE int64_t quantized_at(int64_t index) const { return 4 * blocks + index * value_bytes; }
};

/// Payloads may begin at any byte.
DSC_DEVICE float load_scale(const uint8_t* from) {
    return math::float_of(static_cast<uint32_t>(from[0]) | static_cast<uint32_t>(from[1]) << 8 |
                          static_cast<uint32_t>(from[2]) << 16 | static_cast<uint32_t>(from[3]) << 24);
}

DSC_DEVICE void store_scale(uint8_t* to, float scale) {
    const uint32_t bits = math::bits_of(scale);
    for (int i = 0; i < 4; i++) to[i] = static_cast<uint8_t>(bits >> (8 * i));
}

template <int bits>
DSC_DEVICE float load_quantized(const uint8_t* quantized, int i) {
    if constexpr (bits == 8) return static_cast<float>(static_cast<int8_t>(quantized[i]));
    return static_cast<float>(static_cast<int>((quantized[i / 2] >> (i % 2 * 4) & 15u) ^ 8u) - 8);
}

// --- quantized values of one vector --------------------------------------------------------------------------------

/// The largest quantized value, and what to add to a quotient so that its nearest integer, half to even, is in the low
/// bits: for int4 that and 8, which is not negative.
template <int bits>
constexpr float quant_max = bits == 8 ? 127.0f : 7.0f;
template <int bits>
constexpr float rounding = bits == 8 ? math::kRound : math::kRound + 8.0f;

/// The quantized values of `width` (4 or 8) neighbours: 2, 4 or 8 bytes, in words of up to 4.
template <int bits, int width>
struct Octets {
    static constexpr int bytes = width * bits / 8;
    static constexpr int words = bytes > 4 ? bytes / 4 : 1;
    uint32_t word[words];

    /// From a multiple of 4 bytes, or of 2 if there are 2.
    DSC_DEVICE void load(const uint8_t* from) {
        if constexpr (bytes == 2) {
            word[0] = *reinterpret_cast<const uint16_t*>(from);
        } else {
#pragma unroll
            for (int w = 0; w < words; w++) word[w] = load_wide<uint32_t>(from + 4 * w);
        }
    }

    DSC_DEVICE void store(uint8_t* to) const {
        if constexpr (bytes == 2) {
            *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(word[0]);
        } else {
#pragma unroll
            for (int w = 0; w < words; w++) store_wide(to + 4 * w, word[w]);
        }
    }

    /// 2^23 holds an integer that is not negative in its low bits: the sign of a quantized value is turned for that.
    DSC_DEVICE void decode(float (&values)[width]) const {
        if constexpr (bits == 8) {
#pragma unroll
            for (int j = 0; j < width; j++)
                values[j] = math::add(
                    math::float_of(__byte_perm(word[j / 4] ^ 0x80808080u, 0x4b000000u, 0x7650u + j % 4)), -8388736.0f);
        } else {
            const uint32_t even = (word[0] & 0x0f0f0f0fu) ^ 0x08080808u,
                           odd = (word[0] >> 4 & 0x0f0f0f0fu) ^ 0x08080808u;
#pragma unroll
            for (int j = 0; j < width; j++)
                values[j] = math::add(
                    math::float_of(__byte_perm(j % 2 == 0 ? even : odd, 0x4b000000u, 0x7650u + j / 2)), -8388616.0f);
        }
    }

    /// From the sums of quotients and `rounding`; all 0 unless `kept` is all ones.
    DSC_DEVICE void encode(const float (&sums)[width], uint32_t kept) {
        if constexpr (bits == 8) {
#pragma unroll
            for (int w = 0; w < words; w++) {
                const uint32_t low = __byte_perm(math::bits_of(sums[4 * w]), math::bits_of(sums[4 * w + 1]), 0x0040u);
                const uint32_t high =
                    __byte_perm(math::bits_of(sums[4 * w + 2]), math::bits_of(sums[4 * w + 3]), 0x0040u);
                word[w] = __byte_perm(low, high, 0x5410u) & kept;
            }
        } else {
            // The bits of a sum are those of `rounding` - 8, and q + 8.
            uint32_t sum = math::bits_of(sums[width - 1]), constant = 0x4b400000u;
#pragma unroll
            for (int j = width - 2; j >= 0; j--) {
                sum = sum * 16 + math::bits_of(sums[j]);
                constant = constant * 16 + 0x4b400000u;
            }
            word[0] = ((sum - constant) ^ 0x88888888u) & kept;
        }
    }
};

// --- where a lane works --------------------------------------------------------------------------------------------

/// The vectors of a lane: `sharing` vectors apart, from `first` (a place in the block) on.
template <int sharing, int width>
struct Share {
    int64_t index;  // the block
    int64_t begin;  // its first element
    int first;
    static DSC_DEVICE constexpr int step() { return sharing * width; }
};

// --- what a block is quantized from --------------------------------------------------------------------------------

/// Part of a tensor: `count` values of a payload, the others are 0.
template <class T>
struct Values {
    static constexpr int width = Vector<T>::count;
    const T* data;
    int64_t count;

    DSC_DEVICE bool is_tidy() const { return is_aligned(data); }
    DSC_DEVICE float at(int64_t, int64_t i, int) const { return i < count ? to_float(data[i]) : 0.0f; }

    template <int depth>
    struct Held {
        Vector<T> vectors[depth];
        DSC_DEVICE void get(int d, float (&values)[width]) const { unpack(vectors[d], values); }
    };

    template <int depth, class Share>
    DSC_DEVICE Held<depth> load(const Share& share) const {
        const T* const from = data + share.begin + share.first;
        Held<depth> held;
#pragma unroll
        for (int d = 0; d < depth; d++) held.vectors[d] = load_vector(from + d * Share::step());
        return held;
    }
};

/// The sum over payloads, in their order, of q * (scale * multiplier); values beyond `count` are 0.
template <int bits>
struct Sum {
    static constexpr int width = 4;
    const uint8_t* payloads;
    int payload_count;
    int64_t count;
    Format format;
    float multiplier;

    DSC_DEVICE bool is_tidy() const { return is_aligned(payloads, 4); }

    DSC_DEVICE float at(int64_t index, int64_t i, int place) const {
        const uint8_t* payload = payloads;
        float sum = -0.0f;
#pragma unroll 1
        for (int w = 0; w < payload_count; w++, payload += format.payload_bytes())
            sum = math::add(sum, math::multiply(load_quantized<bits>(payload + format.quantized_at(index), place),
                                                math::multiply(load_scale(payload + 4 * index), multiplier)));
        return i < count ? sum : 0.0f;
    }

    template <int depth>
    struct Held {
        float sums[depth][width];
        DSC_DEVICE void get(int d, float (&values)[width]) const {
#pragma unroll
            for (int j = 0; j < width; j++) values[j] = sums[d][j];
        }
        DSC_DEVICE void add(const Octets<bits, width> (&octets)[depth], float scale) {
#pragma unroll
            for (int d = 0; d < depth; d++) {
                float quantized[width];
                octets[d].decode(quantized);
#pragma unroll
                for (int j = 0; j < width; j++) sums[d][j] = math::add(sums[d][j], math::multiply(quantized[j], scale));
            }
        }
    };

    /// Two payloads at a time are under way.
    template <int depth, class Share>
    DSC_DEVICE Held<depth> load(const Share& share) const {
        const int64_t bytes = format.payload_bytes();
        const uint8_t* scales = payloads + 4 * share.index;
        const uint8_t* quantized = payloads + format.quantized_at(share.index) + share.first * bits / 8;
        Held<depth> held;
#pragma unroll
        for (int d = 0; d < depth; d++)
#pragma unroll
            for (int j = 0; j < width; j++) held.sums[d][j] = -0.0f;  // which changes nothing that it is added to
        const auto load_one = [&](Octets<bits, width>(&octets)[depth], int64_t offset) {
#pragma unroll
            for (int d = 0; d < depth; d++) octets[d].load(quantized + offset + d * Share::step() * bits / 8);
            return *reinterpret_cast<const float*>(scales + offset);
        };
        if (payload_count % 2 != 0) {
            Octets<bits, width> octets[depth];
            const float scale = load_one(octets, 0);
            held.add(octets, math::multiply(scale, multiplier));
            scales += bytes, quantized += bytes;
        }
#pragma unroll 1
        for (int pair = 0; pair < payload_count / 2; pair++, scales += 2 * bytes, quantized += 2 * bytes) {
            Octets<bits, width> first[depth], second[depth];
            const float first_scale = load_one(first, 0), second_scale = load_one(second, bytes);
            held.add(first, math::multiply(first_scale, multiplier));
            held.add(second, math::multiply(second_scale, multiplier));
        }
        return held;
    }
};

/// Values and the residual of those before.
template <int depth, int width>
struct Corrected {
    float values[depth][width];
    DSC_DEVICE void get(int d, float (&out)[width]) const {
#pragma unroll
        for (int j = 0; j < width; j++) out[j] = values[d][j];
    }
};

}  // namespace ds_compress::elementwise
