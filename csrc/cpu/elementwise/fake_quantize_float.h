// Fake quantization to small floats, block by block, by scales that are known.
// To be included in a .cpp of one instruction set.
#pragma once

#include <type_traits>

#include "ds_compress/float_format.h"
#include "float_scales.h"
#include "kernels.h"
#include "halves.h"
#include "simd.h"

namespace ds_compress::cpu {
namespace {

// What is known of the scales of a call. Chosen ones are such that no quotient is beyond twice the largest number, but
// for those in E4M3, which saturate. Powers of two have reciprocals that are floats, so that products are the
// quotients.
enum class Scales { any, chosen, powers_of_two };

// What is known of the length of blocks: what a loop needs for a tail costs registers, and for a vector it is no loop.
enum class Lengths { any, vectors, one_vector };

// Scales as blocks are worked on by them, of up to kLanes blocks: their magnitudes, NaN as every format can hold it,
// and what their values are divided by, or multiplied.
template <Scales kScales>
DSC_INLINE void prepare_scales(const float* scales, int64_t count, float* of_blocks, float* divisors) {
    if (count < kLanes) {
        memcpy(of_blocks, scales, static_cast<size_t>(count) * sizeof scales[0]);
        scales = of_blocks;
    }
    const Ints bits = load_as<Ints>(scales) & INT32_MAX;
    const Ints is_nan = (Ints)(bits > static_cast<int32_t>(math::kInfinityBits));
    const Floats scale = floats_of((bits & ~is_nan) | (is_nan & static_cast<int32_t>(math::kNanBits)));
    store(of_blocks, scale);
    store(divisors, kScales == Scales::powers_of_two ? 1.0f / scale : scale);
}

// What magnitudes become, and those of a block: the sign of a result is that of its value, whatever that of the scale.
template <class Format, Scales kScales>
struct Quantizer {
    Rounding round;
    Floats largest, limit;
    Floats scale, divisor;

    DSC_INLINE explicit Quantizer(const math::FloatFormat& format)
        : round(format.steps), largest(splat(format.largest)), limit(splat(Format::kLargest)), scale(), divisor() {}

    DSC_INLINE Floats rounded(Floats magnitude) const {
        magnitude = kScales == Scales::powers_of_two ? magnitude * divisor : magnitude / divisor;
        if constexpr (kScales == Scales::any) magnitude = smaller(splat(math::kBeyondFormats), magnitude);
        return round(magnitude);
    }
    DSC_INLINE Floats read_back(Floats rounded) const { return smaller(limit, smaller(largest, rounded) * scale); }
};

// 2 kLanes values of bf16: two neighbours lie in a word, and each is the upper half of an fp32 number, so that no
// conversion has to move lanes. Bit i of what is returned: whether value i is kept.
template <Scales kScales, bool kMask>
DSC_INLINE uint32_t quantize_pairs(const uint16_t* from, uint16_t* to, const Quantizer<Bf16, kScales>& quantizer) {
    constexpr int32_t upper = 0x7fff0000, signs = static_cast<int32_t>(0x80008000);
    const Ints words = load_as<Ints>(from);
    const Floats first = quantizer.rounded(floats_of((words << 16) & upper));
    const Floats second = quantizer.rounded(floats_of(words & upper));
    const Ints low = Bf16::rounded_in_upper_half(quantizer.read_back(first)) >> 16;
    const Ints high = Bf16::rounded_in_upper_half(quantizer.read_back(second));
    store(to, joined_halves(low, high) | (words & signs));
    if constexpr (!kMask) return 0;
    return half_sign_bits(joined_halves((Ints)(first <= quantizer.largest), (Ints)(second <= quantizer.largest)));
}

template <class Format, Scales kScales, bool kMask, Lengths kLengths>
void fake_quantize_float_as(const typename Format::Stored* x, typename Format::Stored* y, int64_t blocks, int64_t block,
                            const float* scales, const math::FloatFormat& format, uint8_t* mask, int64_t bit) {
    Quantizer<Format, kScales> quantizer(format);
    [[maybe_unused]] uint8_t unused = 0;
    [[maybe_unused]] BitWriter writer(kMask ? mask : &unused, kMask ? bit : 0);
    constexpr bool kIsBf16 = std::is_same_v<Format, Bf16>;
    const int64_t count = blocks * block;
    const auto one = [&](const typename Format::Stored* from, typename Format::Stored* to, int lanes)
                         __attribute__((always_inline)) {
                             __builtin_prefetch(from + count);  // what comes next, while this is in cache
                             const Floats value = Format::load(from);
                             const Floats rounded = quantizer.rounded(floats_of(bits_of(value) & INT32_MAX));
                             if constexpr (kMask) {
                                 const uint32_t inside = sign_bits((Ints)(rounded <= quantizer.largest));
                                 writer.push(inside & (0xffffffffu >> (32 - lanes)), lanes);
                             }
                             const Ints magnitude = bits_of(quantizer.read_back(rounded));
                             Format::save_tame(to, floats_of(magnitude | (bits_of(value) & INT32_MIN)));
                         };
    [[maybe_unused]] const auto pairs = [&](const auto* from, auto* to) __attribute__((always_inline)) {
        __builtin_prefetch(from + count);
        const uint32_t inside = quantize_pairs<kScales, kMask>(from, to, quantizer);
        if constexpr (kMask) writer.push(inside, 2 * kLanes);
    };
    for (int64_t first = 0; first < blocks; first += kLanes) {
        const int64_t together = blocks - first < kLanes ? blocks - first : kLanes;
        float of_blocks[kLanes], divisors[kLanes];
        prepare_scales<kScales>(scales + first, together, of_blocks, divisors);
        int64_t b = 0;
        if constexpr (kIsBf16 && kLengths == Lengths::one_vector) {
            for (; b + 2 <= together; b += 2, x += 2 * block, y += 2 * block) {
                quantizer.scale = halves(of_blocks[b], of_blocks[b + 1]);
                quantizer.divisor = halves(divisors[b], divisors[b + 1]);
                pairs(x, y);
            }
        }
        for (; b < together; b++, x += block, y += block) {
            quantizer.scale = splat(of_blocks[b]);
            quantizer.divisor = splat(divisors[b]);
            int64_t i = 0;
            if constexpr (kIsBf16 && kLengths == Lengths::vectors)
                for (; i + 2 * kLanes <= block; i += 2 * kLanes) pairs(x + i, y + i);
            for (; i + kLanes <= block; i += kLanes) {
                one(x + i, y + i, kLanes);
                if constexpr (kLengths == Lengths::one_vector) break;
            }
            if (kLengths != Lengths::any || i == block) continue;
            typename Format::Stored rest[kLanes] = {};
            memcpy(rest, x + i, static_cast<size_t>(block - i) * sizeof rest[0]);
            one(rest, rest, static_cast<int>(block - i));
            memcpy(y + i, rest, static_cast<size_t>(block - i) * sizeof rest[0]);
        }
    }
    if constexpr (kMask) writer.finish();
}

template <class Format, Scales kScales, bool kMask>
void fake_quantize_float_by(const void* x, void* y, int64_t blocks, int64_t block, const float* scales,
                            const math::FloatFormat& format, uint8_t* mask, int64_t bit) {
    using Stored = typename Format::Stored;
    const auto* from = static_cast<const Stored*>(x);
    auto* to = static_cast<Stored*>(y);
    const auto run = block == kLanes       ? fake_quantize_float_as<Format, kScales, kMask, Lengths::one_vector>
                     : block % kLanes == 0 ? fake_quantize_float_as<Format, kScales, kMask, Lengths::vectors>
                                           : fake_quantize_float_as<Format, kScales, kMask, Lengths::any>;
    run(from, to, blocks, block, scales, format, mask, bit);
}

template <class Format>
void fake_quantize_float_of(const void* x, void* y, int64_t blocks, int64_t block, const float* scales, bool chosen,
                            const math::FloatFormat& format, uint8_t* mask, int64_t bit) {
    const auto run = [&]<Scales kScales>() {
        mask != nullptr
            ? fake_quantize_float_by<Format, kScales, true>(x, y, blocks, block, scales, format, mask, bit)
            : fake_quantize_float_by<Format, kScales, false>(x, y, blocks, block, scales, format, mask, bit);
    };
    if (!chosen || format.scale_kind == math::kScaleE4m3) return run.template operator()<Scales::any>();
    if (format.scale_kind == math::kScaleE8m0) return run.template operator()<Scales::powers_of_two>();
    run.template operator()<Scales::chosen>();
}

void fake_quantize_float(const void* x, void* y, Float type, int64_t blocks, int64_t block, const float* scales,
                         bool chosen, const math::FloatFormat& format, uint8_t* mask, int64_t bit) {
    switch (type) {
        case Float::bf16:
            return fake_quantize_float_of<Bf16>(x, y, blocks, block, scales, chosen, format, mask, bit);
        case Float::fp16:
            return fake_quantize_float_of<Fp16>(x, y, blocks, block, scales, chosen, format, mask, bit);
        default:
            return fake_quantize_float_of<Fp32>(x, y, blocks, block, scales, chosen, format, mask, bit);
    }
}

}  // namespace
}  // namespace ds_compress::cpu
