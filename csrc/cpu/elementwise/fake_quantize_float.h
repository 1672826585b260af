// Fake quantization to small floats, block by block: the scales of many blocks at once, then their values.
// To be included in a .cpp of one instruction set.
#pragma once

#include "block_maxima.h"
#include "ds_compress/float_format.h"
#include "fake_quantize.h"
#include "kernels.h"
#include "simd.h"

namespace ds_compress::cpu {
namespace {

// math::round_magnitude of every lane, of what is not beyond math::kBeyondFormats.
struct Rounding {
    Ints smallest, shift;

    DSC_INLINE explicit Rounding(math::FloatSteps steps)
        : smallest(splat(static_cast<int32_t>(steps.smallest_bits))), shift(splat(static_cast<int32_t>(steps.shift))) {}
    DSC_INLINE Floats operator()(Floats magnitude) const {
        const Ints exponent = bits_of(magnitude) & static_cast<int32_t>(math::kInfinityBits);
        const Floats constant = floats_of(larger(exponent, smallest) + shift);
        return (magnitude + constant) - constant;
    }
};

DSC_INLINE Floats selected(Ints condition, Floats yes, Floats no) {
    return floats_of((bits_of(yes) & condition) | (bits_of(no) & ~condition));
}

// math::float_scale of every lane.
DSC_INLINE Floats float_scales(Ints largest, const math::FloatFormat& format, float global_scale) {
    Floats scale;
    if (format.scale_kind == math::kScaleE8m0) {
        Ints code = ((largest + static_cast<int32_t>(format.scale_rounding)) >> 23) - format.largest_exponent;
        code = -larger(-code, splat(-254));
        const Ints smallest = splat(static_cast<int32_t>(math::kSmallestE8m0Bits));
        scale = floats_of(larger(code << 23, smallest & (Ints)(code < 1)));
    } else {
        scale = floats_of(largest) / splat(format.largest);
        if (format.scale_kind == math::kScaleFp32) {
            scale = selected((Ints)(scale == 0.0f), splat(math::kScaleOfZeros), scale);
        } else {
            const Floats wanted = smaller(splat(math::kBeyondFormats), splat(global_scale) * scale);
            Floats stored = Rounding(math::kE4m3)(wanted);
            stored = smaller(splat(math::kLargestE4m3), stored);
            stored = selected((Ints)(stored == 0.0f), splat(math::kZeroInE4m3), stored);
            scale = stored / splat(global_scale);
        }
    }
    const Ints is_finite = (Ints)(largest < static_cast<int32_t>(math::kInfinityBits));
    return selected(is_finite, scale, splat(math::float_of(math::kNanBits)));
}

template <class Format>
void float_scales_as(const typename Format::Stored* x, int64_t blocks, int64_t block, const math::FloatFormat& format,
                     float global_scale, float* scales) {
    int64_t b = 0;
    if (block % kLanes == 0)
        for (; b + kLanes <= blocks; b += kLanes)
            store(scales + b, float_scales(block_maxima<Format>(x + b * block, block), format, global_scale));
    for (; b < blocks; b++)
        scales[b] =
            math::float_scale(measure_as<Format, true>(x + b * block, block).largest_bits, format, global_scale);
}

void float_scales(const void* x, Float type, int64_t blocks, int64_t block, const math::FloatFormat& format,
                  float global_scale, float* scales) {
    const auto* wide = static_cast<const float*>(x);
    const auto* narrow = static_cast<const uint16_t*>(x);
    switch (type) {
        case Float::bf16:
            return float_scales_as<Bf16>(narrow, blocks, block, format, global_scale, scales);
        case Float::fp16:
            return float_scales_as<Fp16>(narrow, blocks, block, format, global_scale, scales);
        default:
            return float_scales_as<Fp32>(wide, blocks, block, format, global_scale, scales);
    }
}

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

// The sign of a result is that of the value, whatever that of the scale: all between is done with magnitudes.
template <class Format, Scales kScales, bool kMask, Lengths kLengths>
void fake_quantize_float_as(const typename Format::Stored* x, typename Format::Stored* y, int64_t blocks, int64_t block,
                            const float* scales, const math::FloatFormat& format, uint8_t* mask, int64_t bit) {
    const Rounding round(format.steps);
    const Floats largest = splat(format.largest), limit = splat(Format::kLargest);
    [[maybe_unused]] uint8_t unused = 0;
    [[maybe_unused]] BitWriter writer(kMask ? mask : &unused, kMask ? bit : 0);
    Floats scale, divisor;
    const auto one = [&](const typename Format::Stored* from, typename Format::Stored* to, int lanes)
                         __attribute__((always_inline)) {
                             const Floats value = Format::load(from);
                             Floats magnitude = floats_of(bits_of(value) & INT32_MAX);
                             if constexpr (kScales == Scales::powers_of_two)
                                 magnitude = magnitude * divisor;
                             else
                                 magnitude = magnitude / divisor;
                             if constexpr (kScales == Scales::any)
                                 magnitude = smaller(splat(math::kBeyondFormats), magnitude);
                             const Floats rounded = round(magnitude);
                             if constexpr (kMask) {
                                 const uint32_t inside = sign_bits((Ints)(rounded <= largest));
                                 writer.push(inside & (0xffffffffu >> (32 - lanes)), lanes);
                             }
                             magnitude = smaller(limit, smaller(largest, rounded) * scale);
                             Format::save_tame(to, floats_of(bits_of(magnitude) | (bits_of(value) & INT32_MIN)));
                         };
    const int64_t count = blocks * block;
    for (int64_t first = 0; first < blocks; first += kLanes) {
        const int64_t together = blocks - first < kLanes ? blocks - first : kLanes;
        float of_blocks[kLanes], divisors[kLanes];
        prepare_scales<kScales>(scales + first, together, of_blocks, divisors);
        for (int64_t b = 0; b < together; b++, x += block, y += block) {
            scale = splat(of_blocks[b]);
            divisor = splat(divisors[b]);
            int64_t i = 0;
            do {
                if (kLengths == Lengths::any && i + kLanes > block) break;
                __builtin_prefetch(x + count + i);  // what comes next, while this is in cache
                one(x + i, y + i, kLanes);
                i += kLanes;
            } while (kLengths != Lengths::one_vector && i < block);
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
