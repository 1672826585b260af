// The arguments of fake_quantize_float: their checks, and its results.
#pragma once

#include "ds_compress/float_format.h"
#include "tensors.h"

namespace ds_compress::bindings {

/// The format of a number, and how the scale of a block of them is stored.
struct SmallFloat {
    int exponent_bits, mantissa_bits;
    float largest;
    int scale_kind;
};

/// What fake_quantize_float returns; `mask` is empty where none is wanted.
struct FakeQuantizedFloat {
    Tensor y, scale, mask;
};

inline void check_fake_quantize_float(const Tensor& x, const std::optional<Tensor>& scale,
                                      const std::optional<Tensor>& global_scale, int64_t exponent_bits,
                                      int64_t mantissa_bits, double largest, int64_t scale_kind, int64_t block) {
    const char* op = "fake_quantize_float";
    check(op, "x", x, 2, {kFp32, kBf16, kFp16});
    require(2 <= exponent_bits && exponent_bits <= 5 && 1 <= mantissa_bits && mantissa_bits <= 3 && 0.0 < largest &&
                largest <= 65536.0,
            op, ": a number has 2 to 5 exponent bits, 1 to 3 mantissa bits and a largest value up to 2^16, got ",
            exponent_bits, ", ", mantissa_bits, " and ", largest);
    require(0 <= scale_kind && scale_kind <= 2, op, ": scale_kind is 0, 1 or 2, got ", scale_kind);
    require(block >= 1 && x.size(1) % block == 0, op, ": block divides the ", x.size(1), " columns, got ", block);
    if (scale) {
        check(op, "scale", *scale, 2, {kFp32});
        check_same_device(op, "scale", *scale, x);
        const int64_t blocks = x.size(1) / block;
        require(scale->numel() == 1 || (scale->size(0) == x.size(0) && scale->size(1) == blocks), op, ": scale is (",
                x.size(0), ", ", blocks, ") or (1, 1), got ", shape_of(*scale));
    }
    require(global_scale.has_value() == (!scale && scale_kind == math::kScaleE4m3), op,
            ": a global_scale belongs to scales of kind 2 that are to be chosen");
    if (global_scale) {
        check(op, "global_scale", *global_scale, 1, {kFp32});
        check_same_device(op, "global_scale", *global_scale, x);
        require(global_scale->numel() == 1, op, ": global_scale is one number");
    }
}

}  // namespace ds_compress::bindings
