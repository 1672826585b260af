// Messages of a quantized reduction: quantize with error feedback, read back, add up, and both at once.
//
// Some lanes of a warp, or all, work on one block of a message, each on every so manieth vector of 16 bytes. They hold
// the block in registers, so that it is read once; longer blocks are read a second time, from cache. That is the tidy
// way, for blocks that are all there and lie at multiples of 16 bytes. Others, such as the last of a message, go the
// loose way: two elements at a time, by a warp.
#pragma once

#include "grid.cuh"

#ifndef DSC_QUANTIZE_BLOCKS
#define DSC_QUANTIZE_BLOCKS 4
#endif

namespace ds_compress::elementwise {

struct Format {
    int block;
    int64_t blocks;  // in one message
    int code_bytes;  // of one block
    DSC_DEVICE int64_t message_bytes() const { return blocks * (4 + code_bytes); }
    DSC_DEVICE int64_t codes_at(int64_t index) const { return 4 * blocks + index * code_bytes; }
};

/// Messages may begin at any byte.
DSC_DEVICE float load_scale(const uint8_t* from) {
    return math::float_of(static_cast<uint32_t>(from[0]) | static_cast<uint32_t>(from[1]) << 8 |
                          static_cast<uint32_t>(from[2]) << 16 | static_cast<uint32_t>(from[3]) << 24);
}

DSC_DEVICE float load_aligned_scale(const uint8_t* from) {
    return math::float_of(*reinterpret_cast<const uint32_t*>(from));
}

DSC_DEVICE void store_scale(uint8_t* to, float scale) {
    const uint32_t bits = math::bits_of(scale);
    for (int i = 0; i < 4; i++) to[i] = static_cast<uint8_t>(bits >> (8 * i));
}

template <int bits>
DSC_DEVICE float load_code(const uint8_t* codes, int i) {
    if constexpr (bits == 8) return static_cast<float>(static_cast<int8_t>(codes[i]));
    return static_cast<float>(static_cast<int>((codes[i / 2] >> (i % 2 * 4) & 15u) ^ 8u) - 8);
}

// --- codes of one vector -----------------------------------------------------------------------------------------

/// The codes of `width` (4 or 8) neighbours: 2, 4 or 8 bytes, in words of up to 4.
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

    DSC_DEVICE void decode(float (&values)[width]) const {
#pragma unroll
        for (int j = 0; j < width; j++) {
            // 2^23 holds integers in its low bits; the sign bit is turned so that they are not negative.
            if constexpr (bits == 8)
                values[j] = math::add(
                    math::float_of(__byte_perm(word[j / 4] ^ 0x80808080u, 0x4b000000u, 0x7650u | (j % 4))), -8388736.0f);
            else
                values[j] =
                    math::add(math::float_of(((word[0] ^ 0x88888888u) >> (4 * j) & 15u) | 0x4b000000u), -8388616.0f);
        }
    }

    /// From integers in the low bits of `rounded`.
    DSC_DEVICE void encode(const uint32_t (&rounded)[width], uint32_t kept) {
        if constexpr (bits == 8) {
#pragma unroll
            for (int w = 0; w < words; w++)
                word[w] = __byte_perm(__byte_perm(rounded[4 * w], rounded[4 * w + 1], 0x0040u),
                                      __byte_perm(rounded[4 * w + 2], rounded[4 * w + 3], 0x0040u), 0x5410u) & kept;
        } else {
            word[0] = 0;
#pragma unroll
            for (int j = 0; j < width; j++) word[0] |= (rounded[j] & 15u) << (4 * j);
            word[0] &= kept;
        }
    }
};

// --- values of one vector ----------------------------------------------------------------------------------------

template <int width, class T>
DSC_DEVICE void load_values(const T* from, float (&values)[width]) {
    constexpr int step = Vector<T>::count;
    static_assert(width % step == 0);
#pragma unroll
    for (int v = 0; v < width; v += step) {
        const Vector<T> loaded = load_vector(from + v);
#pragma unroll
        for (int j = 0; j < step; j++) values[v + j] = to_float(loaded.values[j]);
    }
}

template <int width, class T>
DSC_DEVICE void store_values(T* to, const float (&values)[width]) {
    constexpr int step = Vector<T>::count;
    static_assert(width % step == 0);
#pragma unroll
    for (int v = 0; v < width; v += step) {
        Vector<T> stored;
#pragma unroll
        for (int j = 0; j < step; j++) stored.values[j] = from_float<T>(values[v + j]);
        store_vector(to + v, stored);
    }
}

/// What one lane holds of a block: vectors `sharing` apart, as far as they are in it.
template <int sharing, int width>
struct Share {
    int first;  // place in the block
    int block;
    DSC_DEVICE int place(int d) const { return first + d * sharing * width; }
    DSC_DEVICE bool has(int d) const { return place(d) < block; }
};

// --- what a block is quantized from ---------------------------------------------------------------------------------

/// Part of a tensor: `count` values of a message, the others are 0.
template <class T>
struct Values {
    static constexpr int width = Vector<T>::count;
    const T* data;
    int64_t count;

    DSC_DEVICE bool is_tidy() const { return is_aligned(data); }
    DSC_DEVICE float at(int64_t, int64_t i, int) const { return i < count ? to_float(data[i]) : 0.0f; }

    template <class Share, int depth>
    DSC_DEVICE void load(int64_t, int64_t begin, const Share& share, float (&values)[depth][width]) const {
        const T* const from = data + begin + share.first;
        Vector<T> loaded[depth];
#pragma unroll
        for (int d = 0; d < depth; d++)
            if (share.has(d)) loaded[d] = load_vector(from + (share.place(d) - share.first));
#pragma unroll
        for (int d = 0; d < depth; d++)
#pragma unroll
            for (int j = 0; j < width; j++) values[d][j] = share.has(d) ? to_float(loaded[d].values[j]) : 0.0f;
    }
};

/// The sum over messages, in their order, of code * (scale * multiplier); values beyond `count` are 0.
template <int bits>
struct Sum {
    static constexpr int width = 4;
    const uint8_t* messages;
    int message_count;
    int64_t count;
    Format format;
    float multiplier;

    DSC_DEVICE bool is_tidy() const { return is_aligned(messages, 4); }

    DSC_DEVICE float at(int64_t index, int64_t i, int place) const {
        const uint8_t* message = messages;
        float sum = 0.0f;
        for (int w = 0; w < message_count; w++, message += format.message_bytes()) {
            const float product = math::multiply(load_code<bits>(message + format.codes_at(index), place),
                                                 math::multiply(load_scale(message + 4 * index), multiplier));
            sum = w == 0 ? product : math::add(sum, product);
        }
        return i < count ? sum : 0.0f;
    }

    template <class Share, int depth>
    DSC_DEVICE void load(int64_t index, int64_t, const Share& share, float (&values)[depth][width]) const {
        const int64_t bytes = format.message_bytes();
        const uint8_t* scales = messages + 4 * index;
        const uint8_t* codes = messages + format.codes_at(index) + share.first * bits / 8;
        for (int w = 0; w < message_count; w++, scales += bytes, codes += bytes) {
            Octets<bits, width> octets[depth] = {};
#pragma unroll
            for (int d = 0; d < depth; d++)
                if (share.has(d)) octets[d].load(codes + (share.place(d) - share.first) * bits / 8);
            const float scale = share.has(0) ? math::multiply(load_aligned_scale(scales), multiplier) : 0.0f;
#pragma unroll
            for (int d = 0; d < depth; d++) {
                float mine[width];
                octets[d].decode(mine);
#pragma unroll
                for (int j = 0; j < width; j++) {
                    const float product = math::multiply(mine[j], scale);
                    values[d][j] = w == 0 ? product : math::add(values[d][j], product);
                }
            }
        }
#pragma unroll
        for (int d = 0; d < depth; d++)  // a scale may be NaN, and what is not there must not be
#pragma unroll
            for (int j = 0; j < width; j++) values[d][j] = share.has(d) ? values[d][j] : 0.0f;
    }
};

// --- quantizing ---------------------------------------------------------------------------------------------------

/// The largest bit pattern among `sharing` neighbouring lanes.
template <int sharing>
DSC_DEVICE unsigned largest_of(unsigned bits) {
    if constexpr (sharing == 32) {
        return __reduce_max_sync(~0u, bits);
    } else {
#pragma unroll
        for (int distance = sharing / 2; distance > 0; distance /= 2)
            bits = max(bits, __shfl_xor_sync(~0u, bits, distance));
        return bits;
    }
}

template <int depth, int width>
DSC_DEVICE float largest_in(const float (&values)[depth][width]) {
    float largest = 0.0f;
#pragma unroll
    for (int d = 0; d < depth; d++)
#pragma unroll
        for (int j = 0; j < width; j++) largest = larger(largest, fabsf(values[d][j]));
    return largest;
}

/// How the values of a block become codes, given the bits of the largest magnitude.
struct Coder {
    bool is_finite;
    float scale;
    math::Divisor divisor;

    template <int bits>
    static DSC_DEVICE Coder of(unsigned largest) {
        const math::Divisor steps = {1.0f, bits == 8 ? 127.0f : 7.0f, bits == 8 ? 0x1.020408p-7f : 0x1.24924ap-3f, bits == 8 ? 0x1.020408p-35f : -0x1.b6db7p-28f};
        if (largest >= math::kInfinityBits) return {false, math::float_of(math::kNanBits), math::divisor_to_nothing()};
        const float scale = math::scale_or_zero(math::float_of(largest), steps);
        return {true, scale, scale > 0.0f ? math::divisor_of(scale) : math::divisor_to_nothing()};
    }

    /// A code in the low bits. The largest magnitude has the largest code: nothing is to be clamped.
    DSC_DEVICE float rounded(float value) const {
        return math::add(math::quotient(value, divisor), math::kRound);
    }
    DSC_DEVICE float rest(float value, float rounded) const {
        return math::subtract(value, math::multiply(math::subtract(rounded, math::kRound), scale));
    }
};

/// A message under construction, and what of the residual belongs to it, if there is one.
template <int bits, bool has_residual>
struct Target {
    uint8_t* message;
    float* residual;
    int64_t count;    // values of the message; beyond, the residual has none
    Format format;

    DSC_DEVICE bool is_tidy() const { return is_aligned(message, 4) && (!has_residual || is_aligned(residual)); }

    template <class Share, int depth, int width>
    DSC_DEVICE void add_residual(int64_t begin, const Share& share, float (&values)[depth][width]) const {
        if (!has_residual) return;
        const float* const from = residual + begin + share.first;
        float rest[depth][width];
#pragma unroll
        for (int d = 0; d < depth; d++)
            if (share.has(d)) load_values(from + (share.place(d) - share.first), rest[d]);
#pragma unroll
        for (int d = 0; d < depth; d++)
#pragma unroll
            for (int j = 0; j < width; j++)
                values[d][j] = share.has(d) ? math::add(values[d][j], rest[d][j]) : values[d][j];
    }

    template <class Share, int depth, int width>
    DSC_DEVICE void write(int64_t index, int64_t begin, const Share& share, const float (&values)[depth][width],
                          const Coder& coder) const {
        if (share.first == 0) store_scale(message + 4 * index, coder.scale);
        uint8_t* const codes = message + format.codes_at(index) + share.first * bits / 8;
        float* const rests = residual + begin + share.first;
#pragma unroll
        for (int d = 0; d < depth; d++) {
            if (!share.has(d)) continue;
            uint32_t rounded[width];
            float rest[width];
#pragma unroll
            for (int j = 0; j < width; j++) {
                const float whole = coder.rounded(values[d][j]);
                rounded[j] = math::bits_of(whole);
                rest[j] = coder.rest(values[d][j], whole);
            }
            Octets<bits, width> octets;
            octets.encode(rounded, coder.is_finite ? ~0u : 0u);
            octets.store(codes + (share.place(d) - share.first) * bits / 8);
            if (has_residual && coder.is_finite) store_values(rests + (share.place(d) - share.first), rest);
        }
    }

    /// The code in the low bits.
    DSC_DEVICE uint32_t write_one(int64_t i, float value, const Coder& coder) const {
        const float whole = coder.rounded(value);
        if (has_residual && coder.is_finite && i < count) residual[i] = coder.rest(value, whole);
        return coder.is_finite ? math::bits_of(whole) : 0u;
    }
};

/// Block `index` of a message, by `sharing` lanes with `depth` vectors each; `exists`: there is one, and it is tidy. All
/// lanes of the warp come here.
template <int sharing, int depth, int bits, bool has_residual, class Source>
DSC_DEVICE void quantize_block(const Source& source, const Target<bits, has_residual>& target, int64_t index, bool exists) {
    constexpr int width = Source::width;
    const int member = static_cast<int>(threadIdx.x) % sharing;
    const Share<sharing, width> share = {member * width, exists ? target.format.block : 0};
    const int64_t begin = index * target.format.block;
    float values[depth][width];
    source.load(index, begin, share, values);
    target.add_residual(begin, share, values);
    const unsigned largest = largest_of<sharing>(math::bits_of(largest_in(values)));
    if (exists) target.write(index, begin, share, values, Coder::of<bits>(largest));
}

/// A block that is too long for registers, by a warp, in pieces.
template <int depth, int bits, bool has_residual, class Source>
DSC_DEVICE void quantize_long_block(const Source& source, const Target<bits, has_residual>& target, int64_t index) {
    constexpr int width = Source::width, piece = 32 * depth * width;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t begin = index * target.format.block;
    float values[depth][width], largest = 0.0f;
    for (int first = lane * width; first < target.format.block + lane * width; first += piece) {
        const Share<32, width> share = {first, target.format.block};
        source.load(index, begin, share, values);
        target.add_residual(begin, share, values);
        largest = larger(largest, largest_in(values));
    }
    const Coder coder = Coder::of<bits>(largest_of<32>(math::bits_of(largest)));
    for (int first = lane * width; first < target.format.block + lane * width; first += piece) {
        const Share<32, width> share = {first, target.format.block};
        source.load(index, begin, share, values);
        target.add_residual(begin, share, values);
        target.write(index, begin, share, values, coder);
    }
}

/// Any block, by a warp, a lane two values at a time.
template <int bits, bool has_residual, class Source>
DSC_DEVICE void quantize_loose_block(const Source& source, const Target<bits, has_residual>& target, int64_t index) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t begin = index * target.format.block;
    const auto load = [&](int place) {
        const float value = source.at(index, begin + place, place);
        const bool has_rest = has_residual && begin + place < target.count;
        return has_rest ? math::add(value, target.residual[begin + place]) : value;
    };
    float largest = 0.0f;
#pragma unroll 1
    for (int place = lane; place < target.format.block; place += 32) largest = larger(largest, fabsf(load(place)));
    const Coder coder = Coder::of<bits>(largest_of<32>(math::bits_of(largest)));
    if (lane == 0) store_scale(target.message + 4 * index, coder.scale);
    uint8_t* const codes = target.message + target.format.codes_at(index);
    __syncwarp();  // the residual is written where other lanes have read it
#pragma unroll 1
    for (int place = 2 * lane; place < target.format.block; place += 64) {
        const uint32_t low = target.write_one(begin + place, load(place), coder);
        const uint32_t high = target.write_one(begin + place + 1, load(place + 1), coder);
        if constexpr (bits == 8) {
            codes[place] = static_cast<uint8_t>(low);
            codes[place + 1] = static_cast<uint8_t>(high);
        } else {
            codes[place / 2] = static_cast<uint8_t>((low & 15u) | (high & 15u) << 4);
        }
    }
}

// --- kernels: blockIdx.y is the message -----------------------------------------------------------------------------

/// Blocks of a message that are whole and lie where vectors may; the others, from the returned one on, are loose.
DSC_DEVICE int64_t tidy_blocks(bool tidy, int64_t count, const Format& format) { return tidy ? count / format.block : 0; }

/// Calls on_tidy(index, exists) for the blocks before `tidy`, as often in all lanes of a warp, and on_loose(index), by
/// whole warps, for those after it.
template <int sharing, class OnTidy, class OnLoose>
DSC_DEVICE void for_blocks(int64_t tidy, int64_t blocks, const OnTidy& on_tidy, const OnLoose& on_loose) {
    constexpr int at_once = threads / sharing;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * at_once; first < tidy;
         first += static_cast<int64_t>(gridDim.x) * at_once) {
        const int64_t index = first + threadIdx.x / sharing;
        on_tidy(index, index < tidy);
    }
    // The last block of the grid begins, as it is likely to have no other work.
    for (int64_t index = tidy + static_cast<int64_t>(gridDim.x - 1 - blockIdx.x) * warps + threadIdx.x / 32;
         index < blocks; index += static_cast<int64_t>(gridDim.x) * warps)
        on_loose(index);
}

/// What a message of `chunk` values has of `numel` in all.
struct Cut {
    int64_t begin, count;
    static DSC_DEVICE Cut of(int64_t row, int64_t chunk, int64_t numel) {
        const int64_t begin = row * chunk < numel ? row * chunk : numel;
        return {begin, numel - begin < chunk ? numel - begin : chunk};
    }
};

template <int sharing, int depth, int bits, bool has_residual, class Source>
DSC_DEVICE void quantize_message(const Source& source, const Target<bits, has_residual>& target) {
    const int64_t tidy = tidy_blocks(source.is_tidy() && target.is_tidy(), target.count, target.format);
    for_blocks<sharing>(
        tidy, target.format.blocks,
        [&](int64_t index, bool exists) {
            if constexpr (depth > 0)
                quantize_block<sharing, depth>(source, target, index, exists);
            else if (exists)
                quantize_long_block<16 / Source::width>(source, target, index);
        },
        [&](int64_t index) { quantize_loose_block(source, target, index); });
}

/// Blocks of threads on a multiprocessor, which leaves registers for what a lane holds.
template <int depth, int width, bool has_residual>
constexpr int blocks_at_once = depth * width == 16 ? (has_residual ? DSC_QUANTIZE_BLOCKS - 1 : DSC_QUANTIZE_BLOCKS) : has_residual ? 1 : 2;

/// `depth` vectors a lane; 0: long blocks.
template <class T, int bits, bool has_residual, int sharing, int depth>
__global__ void __launch_bounds__(threads, (blocks_at_once<depth, Vector<T>::count, has_residual>))
    block_quantize_kernel(const T* __restrict__ x, int64_t numel, float* __restrict__ residual,
                          uint8_t* __restrict__ messages, int64_t message_count, int64_t chunk, Format format) {
    for (int64_t row = blockIdx.y; row < message_count; row += gridDim.y) {
        const Cut cut = Cut::of(row, chunk, numel);
        const Values<T> values = {x + cut.begin, cut.count};
        const Target<bits, has_residual> target = {messages + row * format.message_bytes(),
                                                   has_residual ? residual + cut.begin : nullptr, cut.count, format};
        quantize_message<sharing, depth>(values, target);
    }
}

template <int bits, bool has_residual, int sharing, int depth>
__global__ void __launch_bounds__(threads, (blocks_at_once<depth, Sum<bits>::width, has_residual>))
    block_reduce_quantize_kernel(Sum<bits> sum, float* __restrict__ residual, uint8_t* __restrict__ message) {
    quantize_message<sharing, depth>(sum, Target<bits, has_residual>{message, residual, sum.count, sum.format});
}

template <class T, int bits>
__global__ void __launch_bounds__(threads)
    block_dequantize_kernel(const uint8_t* __restrict__ messages, int64_t message_count, int64_t chunk, Format format,
                            T* __restrict__ out, int64_t numel) {
    constexpr int width = Vector<T>::count, depth = 16 / width, piece = 32 * depth * width;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int64_t row = blockIdx.y; row < message_count; row += gridDim.y) {
        const Cut cut = Cut::of(row, chunk, numel);
        const uint8_t* const message = messages + row * format.message_bytes();
        T* const to = out + cut.begin;
        const int64_t tidy = tidy_blocks(is_aligned(messages, 4) && is_aligned(to), cut.count, format);
        const auto on_tidy = [&](int64_t index, bool exists) {
            if (!exists) return;
            const float scale = load_aligned_scale(message + 4 * index);
            const uint8_t* const codes = message + format.codes_at(index);
            T* const values_to = to + index * format.block;
            for (int first = lane * width; first < format.block; first += piece) {
                const Share<32, width> share = {first, format.block};
                Octets<bits, width> octets[depth];
#pragma unroll
                for (int d = 0; d < depth; d++)
                    if (share.has(d)) octets[d].load(codes + share.place(d) * bits / 8);
#pragma unroll
                for (int d = 0; d < depth; d++) {
                    if (!share.has(d)) continue;
                    float values[width];
                    octets[d].decode(values);
#pragma unroll
                    for (int j = 0; j < width; j++) values[j] = math::multiply(values[j], scale);
                    store_values(values_to + share.place(d), values);
                }
            }
        };
        for_blocks<32>(tidy, format.blocks, on_tidy, [&](int64_t index) {
            const float scale = load_scale(message + 4 * index);
#pragma unroll 1
            for (int place = lane; place < format.block; place += 32) {
                const int64_t i = index * format.block + place;
                if (i < cut.count)
                    to[i] = from_float<T>(math::multiply(load_code<bits>(message + format.codes_at(index), place), scale));
            }
        });
    }
}

template <int bits>
__global__ void __launch_bounds__(threads) block_reduce_kernel(Sum<bits> sum, float* __restrict__ out) {
    constexpr int width = Sum<bits>::width, depth = 4, piece = 32 * depth * width;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t tidy = tidy_blocks(sum.is_tidy() && is_aligned(out), sum.count, sum.format);
    const auto on_tidy = [&](int64_t index, bool exists) {
        if (!exists) return;
        const int64_t begin = index * sum.format.block;
        for (int first = lane * width; first < sum.format.block; first += piece) {
            const Share<32, width> share = {first, sum.format.block};
            float values[depth][width];
            sum.load(index, begin, share, values);
#pragma unroll
            for (int d = 0; d < depth; d++)
                if (share.has(d)) store_values(out + begin + share.place(d), values[d]);
        }
    };
    for_blocks<32>(tidy, sum.format.blocks, on_tidy, [&](int64_t index) {
#pragma unroll 1
        for (int place = lane; place < sum.format.block; place += 32) {
            const int64_t i = index * sum.format.block + place;
            if (i < sum.count) out[i] = sum.at(index, i, place);
        }
    });
}

}  // namespace ds_compress::elementwise
