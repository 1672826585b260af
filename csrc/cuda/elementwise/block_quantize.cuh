// Payloads of a quantized reduction: quantize with error feedback, read back, add up, and both at once.
//
// Some lanes of a warp, or all, work on one block of a payload, each on every so manieth vector of 16 bytes. They hold
// blocks of common lengths in registers, so that these are read once; others are read a second time, from cache. That
// is the tidy way, for blocks that are all there and lie at multiples of 16 bytes. What is not tidy, such as the last
// block of a payload, goes the loose way: two elements at a time, by a warp.
#pragma once

#include "payload.cuh"

namespace ds_compress::elementwise {

// --- quantizing ----------------------------------------------------------------------------------------------------

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

template <int depth, int width, class Held>
DSC_DEVICE float largest_in(const Held& held) {
    float largest = 0.0f;
#pragma unroll
    for (int d = 0; d < depth; d++) {
        float values[width];
        held.get(d, values);
#pragma unroll
        for (int j = 0; j < width; j++) largest = larger(largest, fabsf(values[j]));
    }
    return largest;
}

/// How the values of a block become quantized values, given the bits of the largest magnitude.
template <int bits>
struct Coder {
    bool is_finite;
    float scale;
    math::Divisor divisor;

    static DSC_DEVICE Coder of(unsigned largest) {
        constexpr math::Divisor steps = bits == 8 ? math::Divisor{1.0f, 127.0f, 0x1.020408p-7f, 0x1.020408p-35f}
                                                  : math::Divisor{1.0f, 7.0f, 0x1.24924ap-3f, -0x1.b6db7p-28f};
        if (largest >= math::kInfinityBits) return {false, math::float_of(math::kNanBits), math::divisor_to_nothing()};
        const float scale = math::scale_or_zero(math::float_of(largest), steps);
        return {true, scale, scale > 0.0f ? math::divisor_of(scale) : math::divisor_to_nothing()};
    }

    /// Quantized, in a sum with `rounding`. The largest magnitude has the largest quantized value: nothing is to be
    /// clamped.
    DSC_DEVICE float sum(float lifted) const {
        return math::add(math::lifted_quotient(lifted, divisor), rounding<bits>);
    }
    DSC_DEVICE float rest(float value, float sum) const {
        return math::subtract(value, math::multiply(math::subtract(sum, rounding<bits>), scale));
    }
};

/// A payload under construction, and what of the residual belongs to it, if there is one.
template <int bits, bool has_residual>
struct Target {
    uint8_t* payload;
    float* residual;
    int64_t count;  // values of the payload; beyond, the residual has none
    Format format;

    DSC_DEVICE bool is_tidy() const { return is_aligned(payload, 4) && (!has_residual || is_aligned(residual)); }

    template <int depth, int width, class Share, class Held>
    DSC_DEVICE auto corrected(const Share& share, const Held& held, bool is_mine) const {
        if constexpr (has_residual) {
            const float* const from = residual + share.begin + share.first;
            Vector<float> rest[depth][width / 4] = {};
            Corrected<depth, width> result;
#pragma unroll
            for (int d = 0; d < depth; d++)
#pragma unroll
                for (int v = 0; v < width / 4; v++)
                    if (is_mine) rest[d][v] = load_vector(from + d * Share::step() + 4 * v);
#pragma unroll
            for (int d = 0; d < depth; d++) {
                held.get(d, result.values[d]);
#pragma unroll
                for (int j = 0; j < width; j++)
                    result.values[d][j] = math::add(result.values[d][j], rest[d][j / 4].values[j % 4]);
            }
            return result;
        } else {
            return held;
        }
    }

    template <int depth, int width, class Share, class Held>
    DSC_DEVICE void write(const Share& share, const Held& held, const Coder<bits>& coder) const {
        if (share.first == 0) *reinterpret_cast<float*>(payload + 4 * share.index) = coder.scale;
        uint8_t* const quantized = payload + format.quantized_at(share.index) + share.first * bits / 8;
#pragma unroll
        for (int d = 0; d < depth; d++) {
            float values[width], sums[width];
            held.get(d, values);
            held.get(d, sums);
            if (coder.divisor.lift != 1.0f) {
#pragma unroll
                for (int j = 0; j < width; j++) sums[j] = math::multiply(sums[j], coder.divisor.lift);
            }
#pragma unroll
            for (int j = 0; j < width; j++) sums[j] = coder.sum(sums[j]);
            Octets<bits, width> octets;
            octets.encode(sums, coder.is_finite ? ~0u : 0u);
            octets.store(quantized + d * Share::step() * bits / 8);
            if constexpr (has_residual) {
                float* const rests = residual + share.begin + share.first + d * Share::step();
                if (!coder.is_finite) continue;
#pragma unroll
                for (int v = 0; v < width; v += 4) {
                    Vector<float> rest;
#pragma unroll
                    for (int j = 0; j < 4; j++) rest.values[j] = coder.rest(values[v + j], sums[v + j]);
                    store_vector(rests + v, rest);
                }
            }
        }
    }

    /// The quantized value in the low bits.
    DSC_DEVICE uint32_t write_one(int64_t i, float value, const Coder<bits>& coder) const {
        const float sum = coder.sum(math::multiply(value, coder.divisor.lift));
        if (has_residual && coder.is_finite && i < count) residual[i] = coder.rest(value, sum);
        return coder.is_finite ? math::bits_of(math::subtract(sum, rounding<bits> - math::kRound)) : 0u;
    }
};

/// A tidy block of sharing * depth vectors, by `sharing` lanes with `depth` vectors each. All lanes of the warp come
/// here, some perhaps with a block that is another's to write (`is_mine` false).
template <int sharing, int depth, int bits, bool has_residual, class Source>
DSC_DEVICE void quantize_block(const Source& source, const Target<bits, has_residual>& target, int64_t index,
                               bool is_mine) {
    constexpr int width = Source::width;
    const int member = static_cast<int>(threadIdx.x) % sharing;
    const Share<sharing, width> share = {index, index * target.format.block, member * width};
    const auto loaded = source.template load<depth>(share);
    const auto held = target.template corrected<depth, width>(share, loaded, is_mine);
    const unsigned largest = largest_of<sharing>(math::bits_of(largest_in<depth, width>(held)));
    if (is_mine) target.template write<depth, width>(share, held, Coder<bits>::of(largest));
}

/// A tidy block of any length, by a warp, vector by vector.
template <int bits, bool has_residual, class Source>
DSC_DEVICE void quantize_any_block(const Source& source, const Target<bits, has_residual>& target, int64_t index) {
    constexpr int width = Source::width;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float largest = 0.0f;
#pragma unroll 1
    for (int first = lane * width; first < target.format.block; first += 32 * width) {
        const Share<32, width> share = {index, index * target.format.block, first};
        const auto held = target.template corrected<1, width>(share, source.template load<1>(share), true);
        largest = larger(largest, largest_in<1, width>(held));
    }
    const Coder<bits> coder = Coder<bits>::of(largest_of<32>(math::bits_of(largest)));
#pragma unroll 1
    for (int first = lane * width; first < target.format.block; first += 32 * width) {
        const Share<32, width> share = {index, index * target.format.block, first};
        const auto held = target.template corrected<1, width>(share, source.template load<1>(share), true);
        target.template write<1, width>(share, held, coder);
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
    const Coder<bits> coder = Coder<bits>::of(largest_of<32>(math::bits_of(largest)));
    if (lane == 0) store_scale(target.payload + 4 * index, coder.scale);
    uint8_t* const quantized = target.payload + target.format.quantized_at(index);
    __syncwarp();  // the residual is written where other lanes have read it
#pragma unroll 1
    for (int place = 2 * lane; place < target.format.block; place += 64) {
        const uint32_t low = target.write_one(begin + place, load(place), coder);
        const uint32_t high = target.write_one(begin + place + 1, load(place + 1), coder);
        if constexpr (bits == 8) {
            quantized[place] = static_cast<uint8_t>(low);
            quantized[place + 1] = static_cast<uint8_t>(high);
        } else {
            quantized[place / 2] = static_cast<uint8_t>((low & 15u) | (high & 15u) << 4);
        }
    }
}

// --- kernels: blockIdx.y is the payload ----------------------------------------------------------------------------

/// How many blocks of a payload of `count` values are tidy; the others, from there on, are loose.
DSC_DEVICE int64_t tidy_blocks(bool tidy, int64_t count, bool is_whole, const Format& format) {
    if (!tidy) return 0;
    return is_whole ? format.whole_blocks : count / format.block;
}

/// Calls on_tidy(index, is_mine) for the blocks before `tidy`, as often in all lanes of a warp, and on_loose(index), by
/// whole warps, for those after it. A lane without a block of its own gets another's.
template <int sharing, class OnTidy, class OnLoose>
DSC_DEVICE void for_blocks(int64_t tidy, int64_t blocks, const OnTidy& on_tidy, const OnLoose& on_loose) {
    constexpr int at_once = block_threads / sharing;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * at_once; first < tidy;
         first += static_cast<int64_t>(gridDim.x) * at_once) {
        if (first + threadIdx.x / 32 * (32 / sharing) >= tidy) break;  // nothing for this warp
        const int64_t index = first + threadIdx.x / sharing;
        on_tidy(index < tidy ? index : tidy - 1, index < tidy);
    }
    // The last blocks of the grid begin, as they are likely to have no other work.
    for (int64_t index = tidy + static_cast<int64_t>(gridDim.x - 1 - blockIdx.x) * block_warps + threadIdx.x / 32;
         index < blocks; index += static_cast<int64_t>(gridDim.x) * block_warps)
        on_loose(index);
}

/// What a payload of `chunk` values has of `numel` in all.
struct Cut {
    int64_t begin, count;
    bool is_whole;
    static DSC_DEVICE Cut of(int64_t row, int64_t chunk, int64_t numel) {
        const int64_t begin = row * chunk < numel ? row * chunk : numel;
        return numel - begin < chunk ? Cut{begin, numel - begin, false} : Cut{begin, chunk, true};
    }
};

/// `depth` 0: blocks of any length.
template <int sharing, int depth, int bits, bool has_residual, class Source>
DSC_DEVICE void quantize_payload(const Source& source, const Target<bits, has_residual>& target, bool is_whole) {
    const int64_t tidy = tidy_blocks(source.is_tidy() && target.is_tidy(), target.count, is_whole, target.format);
    for_blocks<sharing>(
        tidy, target.format.blocks,
        [&](int64_t index, bool is_mine) {
            if constexpr (depth > 0)
                quantize_block<sharing, depth>(source, target, index, is_mine);
            else if (is_mine)
                quantize_any_block(source, target, index);
        },
        [&](int64_t index) { quantize_loose_block(source, target, index); });
}

/// Blocks of threads on a multiprocessor, which leaves registers for what a lane holds: 16 values, or more.
template <int values, bool has_residual>
constexpr int blocks_at_once = values <= 16   ? (has_residual ? 6 : 8)
                               : has_residual ? 3
                                              : 4;

template <class T, int bits, bool has_residual, int sharing, int depth>
__global__ void __launch_bounds__(block_threads, (blocks_at_once<depth * Vector<T>::count, has_residual>))
    block_quantize_kernel(const T* __restrict__ x, int64_t numel, float* __restrict__ residual,
                          uint8_t* __restrict__ payloads, int64_t payload_count, int64_t chunk, Format format) {
    for (int64_t row = blockIdx.y; row < payload_count; row += gridDim.y) {
        const Cut cut = Cut::of(row, chunk, numel);
        const Values<T> values = {x + cut.begin, cut.count};
        const Target<bits, has_residual> target = {payloads + row * format.payload_bytes(),
                                                   has_residual ? residual + cut.begin : nullptr, cut.count, format};
        quantize_payload<sharing, depth>(values, target, cut.is_whole);
    }
}

template <int bits, bool has_residual, int sharing, int depth>
__global__ void __launch_bounds__(block_threads, (blocks_at_once<depth * Sum<bits>::width, has_residual>))
    block_reduce_quantize_kernel(Sum<bits> sum, float* __restrict__ residual, uint8_t* __restrict__ payload) {
    quantize_payload<sharing, depth>(sum, Target<bits, has_residual>{payload, residual, sum.count, sum.format}, true);
}

template <class T, int bits, int sharing, int depth>
__global__ void __launch_bounds__(block_threads)
    block_dequantize_kernel(const uint8_t* __restrict__ payloads, int64_t payload_count, int64_t chunk, Format format,
                            T* __restrict__ out, int64_t numel) {
    constexpr int width = Vector<T>::count;
    for (int64_t row = blockIdx.y; row < payload_count; row += gridDim.y) {
        const Cut cut = Cut::of(row, chunk, numel);
        const uint8_t* const payload = payloads + row * format.payload_bytes();
        T* const to = out + cut.begin;
        const int64_t tidy = tidy_blocks(is_aligned(payloads, 4) && is_aligned(to), cut.count, cut.is_whole, format);
        const auto read = [&](const auto& octets, float scale, T* place) {
            float values[width];
            octets.decode(values);
#pragma unroll
            for (int j = 0; j < width; j++) values[j] = math::multiply(values[j], scale);
            store_passing_vector(place, pack<T>(values));
        };
        const auto on_tidy = [&](int64_t index, bool is_mine) {
            const int member = static_cast<int>(threadIdx.x) % sharing;
            const float scale = *reinterpret_cast<const float*>(payload + 4 * index);
            const uint8_t* const quantized = payload + format.quantized_at(index);
            T* const values_to = to + index * format.block;
            if constexpr (depth > 0) {
                Octets<bits, width> octets[depth];
#pragma unroll
                for (int d = 0; d < depth; d++)
                    octets[d].load(quantized + (d * sharing + member) * Octets<bits, width>::bytes);
#pragma unroll
                for (int d = 0; d < depth; d++)
                    if (is_mine) read(octets[d], scale, values_to + (d * sharing + member) * width);
            } else if (is_mine) {
                for (int place = member * width; place < format.block; place += sharing * width) {
                    Octets<bits, width> octets;
                    octets.load(quantized + place * bits / 8);
                    read(octets, scale, values_to + place);
                }
            }
        };
        for_blocks<sharing>(tidy, format.blocks, on_tidy, [&](int64_t index) {
            const float scale = load_scale(payload + 4 * index);
#pragma unroll 1
            for (int place = static_cast<int>(threadIdx.x) % 32; place < format.block; place += 32) {
                const int64_t i = index * format.block + place;
                if (i < cut.count)
                    to[i] = from_float<T>(
                        math::multiply(load_quantized<bits>(payload + format.quantized_at(index), place), scale));
            }
        });
    }
}

template <int bits, int sharing, int depth>
__global__ void __launch_bounds__(block_threads, (blocks_at_once<depth * 4, false>))
    block_reduce_kernel(Sum<bits> sum, float* __restrict__ out) {
    constexpr int width = Sum<bits>::width;
    const int64_t tidy = tidy_blocks(sum.is_tidy() && is_aligned(out), sum.count, true, sum.format);
    const auto on_tidy = [&](int64_t index, bool is_mine) {
        constexpr int at_once = depth > 0 ? depth : 1;
        const int begin = static_cast<int>(threadIdx.x) % sharing * width;
        if (depth == 0 && !is_mine) return;
        for (int first = begin; first < sum.format.block; first += at_once * sharing * width) {
            const Share<sharing, width> share = {index, index * sum.format.block, first};
            const auto held = sum.template load<at_once>(share);
#pragma unroll
            for (int d = 0; d < at_once; d++) {
                float values[width];
                held.get(d, values);
                if (is_mine) store_passing_vector(out + share.begin + first + d * share.step(), pack<float>(values));
            }
            if (depth > 0) break;
        }
    };
    for_blocks<sharing>(tidy, sum.format.blocks, on_tidy, [&](int64_t index) {
#pragma unroll 1
        for (int place = static_cast<int>(threadIdx.x) % 32; place < sum.format.block; place += 32) {
            const int64_t i = index * sum.format.block + place;
            if (i < sum.count) out[i] = sum.at(index, i, place);
        }
    });
}

}  // namespace ds_compress::elementwise
