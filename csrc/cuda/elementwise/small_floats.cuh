// Fake quantization of single values to floats of 4 to 8 bits: the `Quantizer` of fake_quantize.cuh for them.
//
// Formats are numbers known at run time and rounding is two additions in fp32, as on the CPU: there is no need for the
// conversions that some GPUs have for some of the formats. These kernels wait for memory, so that an instruction less
// is no time less; the same bits come out on every architecture from sm_80 on; and a conversion would not say what
// saturated.
#pragma once

#include "ds_compress/float_format.h"
#include "span.cuh"

namespace ds_compress::elementwise {

struct SmallFloats {
    static constexpr bool symmetric = true;
    static constexpr bool has_small_blocks = true;
    math::FloatFormat format;
    const float* global_scale;  // or null
    bool powers_of_two;         // whether all scales are that, so that multiplying by the reciprocal is dividing

    /// `divisor.lift` is the reciprocal of a power of two.
    struct Working {
        float scale, limit;
        math::Divisor divisor;
    };

    DSC_DEVICE math::ScaleAndOffset range(const Span<true>& span, int64_t) const {
        const float of_all = global_scale != nullptr ? *global_scale : 1.0f;
        return {math::float_scale(math::bits_of(span.largest), format, of_all), 0.0f};
    }

    template <class T>
    DSC_DEVICE Working working(math::ScaleAndOffset range) const {
        // The sign of a result is that of the value, whatever that of the scale: all is done with magnitudes.
        const float scale = fabsf(range.scale);
        if (powers_of_two) return {scale, Largest<T>::value, {math::reciprocal_of_power(scale), 1.0f, 1.0f, 0.0f}};
        return {scale, Largest<T>::value, math::divisor_of(scale)};
    }

    /// What of a scaled magnitude and the sign of `value` is left.
    DSC_DEVICE Quantized finish(float magnitude, float value, const Working& work) const {
        const float q = math::round_magnitude(smaller(magnitude, math::kBeyondFormats), format.steps);
        const float read_back = math::multiply(smaller(q, format.largest), work.scale);
        return {math::with_sign_of(smaller(read_back, work.limit), value), q <= format.largest};
    }

    template <class T>
    DSC_DEVICE unsigned quantize(Vector<T>& vector, const Working& work, bool wants_mask) const {
        constexpr int width = Vector<T>::count;
        float values[width], magnitudes[width];
        unpack(vector, values);
#pragma unroll
        for (int j = 0; j < width; j++) magnitudes[j] = math::multiply(fabsf(values[j]), work.divisor.lift);
        if (!powers_of_two) {
#pragma unroll
            for (int j = 0; j < width; j++) magnitudes[j] = math::any_lifted_quotient(magnitudes[j], work.divisor);
        }
        unsigned mask = 0;
#pragma unroll
        for (int j = 0; j < width; j++) {
            const Quantized one = finish(magnitudes[j], values[j], work);
            if (wants_mask && one.is_inside) mask |= 1u << j;
            values[j] = one.value;
        }
        vector = pack<T>(values);
        return mask;
    }

    template <class T>
    DSC_DEVICE unsigned quantize_measured(Vector<T>& vector, const Working& work, bool wants_mask) const {
        return quantize(vector, work, wants_mask);
    }

    DSC_DEVICE Quantized quantize_one(float value, const Working& work) const {
        const float lifted = math::multiply(fabsf(value), work.divisor.lift);
        return finish(powers_of_two ? lifted : math::any_lifted_quotient(lifted, work.divisor), value, work);
    }
};

}  // namespace ds_compress::elementwise
