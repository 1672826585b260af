// Every elementwise op, once for all devices: arguments are checked and results allocated here, a `Device` does the
// work.
//
// A `Device` is a class of static functions that check nothing, each named as its op; see `Cpu` and `Cuda`.
#pragma once

#include <cstring>
#include <tuple>

#include "ds_compress/math.h"
#include "float_arguments.h"
#include "tensors.h"

namespace ds_compress::bindings {

// --- masks ---------------------------------------------------------------------------------------------------------

inline void check_bits(const char* op, const Tensor& packed, int64_t count, int64_t bit_offset) {
    check(op, "packed", packed, 1, {kByte});
    require(count >= 0 && bit_offset >= 0, op, ": a count of ", count, " or a bit_offset of ", bit_offset,
            " is negative");
    require(count <= 8 * packed.numel() - bit_offset, op, ": bits ", bit_offset, " to ", bit_offset + count,
            " of a mask of ", packed.numel(), " bytes");
}

inline void check_masked(const char* op, const Tensor& weights, const Tensor& packed, int64_t bit_offset) {
    check(op, "weights", weights, 1, {kFp32, kBf16, kFp16, kFp64});
    check_same_device(op, "packed", packed, weights);
    check_bits(op, packed, weights.numel(), bit_offset);
}

/// The bits of `fill` in the dtype of the weights.
inline uint64_t pattern_of(double fill, ScalarType type) {
    const auto narrow = static_cast<float>(fill);
    switch (type) {
        case kBf16:
            return math::bf16_of_float(narrow);
        case kFp16:
            return math::fp16_of_float(narrow);
        case kFp64: {
            uint64_t bits;
            memcpy(&bits, &fill, sizeof bits);
            return bits;
        }
        default:
            return math::bits_of(narrow);
    }
}

inline Tensor new_bits(const Tensor& like, int64_t count) { return new_tensor(like, {(count + 7) / 8}, kByte); }

// --- payloads of a reduction ---------------------------------------------------------------------------------------

inline int64_t blocks_of(int64_t numel, int64_t block) { return (numel + block - 1) / block; }

inline int64_t payload_bytes(int64_t numel, int64_t bits, int64_t block) {
    return blocks_of(numel, block) * (4 + block * bits / 8);
}

/// How the values of one payload are quantized.
struct PayloadFormat {
    int bits, block;
};

inline PayloadFormat checked_format(const char* op, int64_t bits, int64_t block) {
    require(bits == 8 || bits == 4, op, ": bits is 8 or 4, got ", bits);
    require(block % 32 == 0 && 32 <= block && block <= 8192, op, ": block is a multiple of 32 up to 8192, got ", block);
    return {static_cast<int>(bits), static_cast<int>(block)};
}

inline void check_payloads(const char* op, const Tensor& payloads, int64_t numel, int64_t chunk, PayloadFormat format) {
    check(op, "payloads", payloads, 2, {kByte});
    const int64_t bytes = payload_bytes(chunk < 0 ? 0 : chunk, format.bits, format.block);
    require(chunk >= 0 && payloads.size(1) == bytes, op, ": a payload of ", chunk, " elements has ", bytes,
            " bytes, got rows of ", payloads.size(1));
    require(payloads.size(0) * chunk >= numel, op, ": ", payloads.size(0), " payloads of ", chunk,
            " elements do not hold ", numel);
}

inline void check_summands(const char* op, const Tensor& payloads, int64_t numel, PayloadFormat format) {
    require(payloads.dim() != 2 || payloads.size(0) >= 1, op, ": there is no payload to add up");
    check_payloads(op, payloads, 0, numel, format);
}

inline void check_residual(const char* op, const std::optional<Tensor>& residual, int64_t numel, const Tensor& like) {
    if (!residual) return;
    check(op, "residual", *residual, 1, {kFp32});
    check_same_device(op, "residual", *residual, like);
    require(residual->numel() == numel, op, ": residual has ", residual->numel(), " elements for ", numel, " values");
}

// --- fake quantization ---------------------------------------------------------------------------------------------

struct QuantRange {
    int quant_min, quant_max, steps;
    bool symmetric;
};

/// What fake_quantize returns; `mask` is empty where none is wanted, `offset` where the range is symmetric.
struct FakeQuantized {
    Tensor y, scale, offset, mask;
};

inline void check_fake_quantize(const Tensor& x, const std::optional<Tensor>& scale,
                                const std::optional<Tensor>& offset, int64_t quant_min, int64_t quant_max,
                                int64_t steps, bool symmetric) {
    const std::string op = "fake_quantize: ";
    const ScalarType type = x.scalar_type();
    require(type == kFp32 || type == kBf16 || type == kFp16, op, "x is float32, bfloat16 or float16, got ",
            name_of(type));
    require(x.dim() == 2 && x.is_contiguous(), op, "x is a contiguous matrix (R, C), got ", shape_of(x));
    require(-128 <= quant_min && quant_min <= quant_max && quant_max <= 255 && steps >= 1, op,
            "-128 <= quant_min <= quant_max <= 255 and steps >= 1, got ", quant_min, ", ", quant_max, ", ", steps);
    const char* names[] = {"scale", "offset"};
    const std::optional<Tensor>* given[] = {&scale, &offset};
    for (int i = 0; i < 2; i++) {
        if (!given[i]->has_value()) continue;
        const Tensor& values = **given[i];
        require(values.scalar_type() == kFp32 && values.is_contiguous() && values.device() == x.device(), op, names[i],
                " is contiguous float32 on the device of x");
        require(values.dim() == 1 && (values.numel() == 1 || values.numel() == x.size(0)), op, names[i], " is (",
                x.size(0), ",) or (1,), got ", shape_of(values));
    }
    require(!offset || (!symmetric && scale), op, "an offset belongs to a given scale of an asymmetric range");
    require(!scale || offset || symmetric, op, "an asymmetric range with a given scale needs its offset");
    require(!scale || !offset || scale->numel() == offset->numel(), op, "scale and offset have the same length");
}

// --- the ops -------------------------------------------------------------------------------------------------------

template <class Device>
struct Elementwise {
    static void mask_apply_(const Tensor& weights, const Tensor& packed, int64_t bit_offset, double fill) {
        check_masked("mask_apply_", weights, packed, bit_offset);
        Device::mask_apply(weights, packed, bit_offset, pattern_of(fill, weights.scalar_type()));
    }

    static void mask_apply_many_(std::vector<Tensor> weights, std::vector<Tensor> packed,
                                 std::vector<int64_t> bit_offsets, double fill) {
        const char* op = "mask_apply_many_";
        require(weights.size() == packed.size() && weights.size() == bit_offsets.size(), op, ": ", weights.size(),
                " weights, ", packed.size(), " masks and ", bit_offsets.size(), " bit_offsets");
        for (size_t i = 0; i < weights.size(); i++) {
            check_masked(op, weights[i], packed[i], bit_offsets[i]);
            check_same_device(op, "weights", weights[i], weights[0]);
        }
        if (!weights.empty()) Device::mask_apply_many(weights, packed, bit_offsets, fill);
    }

    static Tensor mask_pack(const Tensor& mask) {
        check("mask_pack", "mask", mask, 1, {ScalarType::Bool});
        Tensor packed = new_bits(mask, mask.numel());
        Device::mask_pack(mask, packed);
        return packed;
    }

    static Tensor mask_unpack(const Tensor& packed, int64_t numel, int64_t bit_offset) {
        check_bits("mask_unpack", packed, numel, bit_offset);
        Tensor mask = new_tensor(packed, {numel}, ScalarType::Bool);
        Device::mask_unpack(packed, bit_offset, mask);
        return mask;
    }

    static Tensor mask_n_of_m(const Tensor& scores, int64_t n, int64_t m) {
        check("mask_n_of_m", "scores", scores, 2, {kFp32});
        require(0 <= n && n <= m && m >= 1 && m <= INT32_MAX,
                "mask_n_of_m: 0 <= n <= m and m >= 1 are needed, got n = ", n, ", m = ", m);
        Tensor packed = new_bits(scores, scores.numel());
        Device::mask_n_of_m(scores, n, m, packed);
        return packed;
    }

    static std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quantize(const Tensor& x, const std::optional<Tensor>& scale,
                                                                    const std::optional<Tensor>& offset,
                                                                    int64_t quant_min, int64_t quant_max, int64_t steps,
                                                                    bool symmetric, bool with_mask) {
        check_fake_quantize(x, scale, offset, quant_min, quant_max, steps, symmetric);
        const int64_t ranges = scale ? scale->numel() : x.size(0);
        const FakeQuantized to{new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type()), new_tensor(x, {ranges}, kFp32),
                               new_tensor(x, {symmetric ? 0 : ranges}, kFp32), new_bits(x, with_mask ? x.numel() : 0)};
        const QuantRange range{static_cast<int>(quant_min), static_cast<int>(quant_max), static_cast<int>(steps),
                               symmetric};
        Device::fake_quantize(x, scale, offset, range, with_mask, to);
        return {to.y, to.scale, to.offset, to.mask};
    }

    static std::tuple<Tensor, Tensor, Tensor> fake_quantize_float(const Tensor& x, const std::optional<Tensor>& scale,
                                                                  const std::optional<Tensor>& global_scale,
                                                                  int64_t exponent_bits, int64_t mantissa_bits,
                                                                  double largest, int64_t scale_kind, int64_t block,
                                                                  bool with_mask) {
        check_fake_quantize_float(x, scale, global_scale, exponent_bits, mantissa_bits, largest, scale_kind, block);
        const SmallFloat number{static_cast<int>(exponent_bits), static_cast<int>(mantissa_bits),
                                static_cast<float>(largest), static_cast<int>(scale_kind)};
        const std::vector<int64_t> scales =
            scale ? std::vector{scale->size(0), scale->size(1)} : std::vector{x.size(0), x.size(1) / block};
        const FakeQuantizedFloat to{new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type()),
                                    new_tensor(x, scales, kFp32), new_bits(x, with_mask ? x.numel() : 0)};
        Device::fake_quantize_float(x, scale, global_scale, number, block, with_mask, to);
        return {to.y, to.scale, to.mask};
    }

    static void block_quantize(const Tensor& x, const Tensor& payloads, const std::optional<Tensor>& residual,
                               int64_t chunk, int64_t bits, int64_t block) {
        const char* op = "block_quantize";
        const PayloadFormat format = checked_format(op, bits, block);
        check(op, "x", x, 1, {kFp32, kBf16, kFp16});
        check_payloads(op, payloads, x.numel(), chunk, format);
        check_same_device(op, "payloads", payloads, x);
        check_residual(op, residual, x.numel(), x);
        Device::block_quantize(x, payloads, residual, chunk, format);
    }

    static void block_dequantize(const Tensor& payloads, const Tensor& out, int64_t chunk, int64_t bits,
                                 int64_t block) {
        const char* op = "block_dequantize";
        const PayloadFormat format = checked_format(op, bits, block);
        check(op, "out", out, 1, {kFp32, kBf16, kFp16});
        check_payloads(op, payloads, out.numel(), chunk, format);
        check_same_device(op, "payloads", payloads, out);
        Device::block_dequantize(payloads, out, chunk, format);
    }

    static void block_reduce(const Tensor& payloads, const Tensor& out, int64_t bits, int64_t block,
                             double multiplier) {
        const char* op = "block_reduce";
        const PayloadFormat format = checked_format(op, bits, block);
        check(op, "out", out, 1, {kFp32});
        check_summands(op, payloads, out.numel(), format);
        check_same_device(op, "payloads", payloads, out);
        Device::block_reduce(payloads, out, format, static_cast<float>(multiplier));
    }

    static void block_reduce_quantize(const Tensor& payloads, const Tensor& payload,
                                      const std::optional<Tensor>& residual, int64_t numel, int64_t bits, int64_t block,
                                      double multiplier) {
        const char* op = "block_reduce_quantize";
        const PayloadFormat format = checked_format(op, bits, block);
        check_summands(op, payloads, numel, format);
        check(op, "payload", payload, 1, {kByte});
        check_same_device(op, "payload", payload, payloads);
        require(payload.numel() == payloads.size(1), op, ": payload has ", payload.numel(), " bytes, the summands ",
                payloads.size(1));
        check_residual(op, residual, numel, payloads);
        Device::block_reduce_quantize(payloads, payload, residual, numel, format, static_cast<float>(multiplier));
    }

    template <class Library>
    static void register_in(Library& m) {
        m.impl("mask_apply_", TORCH_BOX(&mask_apply_));
        m.impl("mask_apply_many_", TORCH_BOX(&mask_apply_many_));
        m.impl("mask_pack", TORCH_BOX(&mask_pack));
        m.impl("mask_unpack", TORCH_BOX(&mask_unpack));
        m.impl("mask_n_of_m", TORCH_BOX(&mask_n_of_m));
        m.impl("fake_quantize", TORCH_BOX(&fake_quantize));
        m.impl("fake_quantize_float", TORCH_BOX(&fake_quantize_float));
        m.impl("block_quantize", TORCH_BOX(&block_quantize));
        m.impl("block_dequantize", TORCH_BOX(&block_dequantize));
        m.impl("block_reduce", TORCH_BOX(&block_reduce));
        m.impl("block_reduce_quantize", TORCH_BOX(&block_reduce_quantize));
    }
};

}  // namespace ds_compress::bindings
