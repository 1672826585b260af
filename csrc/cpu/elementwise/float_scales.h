// The scales of blocks of small floats, of a vector's worth of blocks at once.
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

}  // namespace
}  // namespace ds_compress::cpu
