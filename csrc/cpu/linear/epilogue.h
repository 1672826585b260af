// Sums of products to results. To be included in a .cpp of one instruction set.
#pragma once

#include "activation.h"

namespace ds_compress::cpu {
namespace {

// What belongs to the columns of one panel, padded to its width.
template <int kColumns>
struct PanelColumns {
    alignas(64) float scale[kColumns] = {};
    alignas(64) float bias[kColumns];
    int64_t count;

    DSC_INLINE PanelColumns(const LinearCall& call, int64_t first) {
        const int64_t left = call.weight.rows - first;
        count = left < kColumns ? left : kColumns;
        for (int j = 0; j < kColumns; j++) bias[j] = -0.0f;  // adds nothing, not even to -0.0
        if (call.weight_scale != nullptr) memcpy(scale, call.weight_scale + first, count * sizeof(float));
        if (call.bias != nullptr) memcpy(bias, call.bias + first, count * sizeof(float));
    }
};

template <class Format, Activation kActivation>
DSC_INLINE void finish(typename Format::Stored* y, int64_t j, int64_t count, Floats value) {
    value = activate<kActivation>(value);
    if (j + kLanes <= count) {
        Format::save(y + j, value);
    } else if (j < count) {
        typename Format::Stored whole[kLanes];
        Format::save(whole, value);
        memcpy(y + j, whole, (count - j) * sizeof(*y));
    }
}

// A part of the result.
struct Rectangle {
    uint8_t* begin;
    int64_t stride;  // of a row, in bytes
    int64_t rows;
    int64_t width;  // in bytes

    DSC_INLINE Rectangle(const LinearCall& call, int64_t row, int64_t rows, int64_t column, int64_t columns)
        : rows(rows) {
        const int64_t size = call.y_type == LinearType::fp32 ? 4 : 2;
        begin = static_cast<uint8_t*>(call.y) + (row * call.weight.rows + column) * size;
        stride = call.weight.rows * size;
        width = columns * size;
    }
    // Rows are far apart, so no hardware foresees them, and stores that miss the cache hold up all that follow.
    DSC_INLINE void prefetch() const {
        for (int64_t m = 0; m < rows; m++)
            for (int64_t i = 0; i < width; i += 64) __builtin_prefetch(begin + m * stride + i, 1);
    }
};

// y = activation(float(sum - correction) * (input scale * weight scale) + bias) for rows of one panel.
template <class Format, Activation kActivation, int kColumns>
void dequantize(const int32_t* sums, const float* input_scale, const int32_t* correction,
                const PanelColumns<kColumns>& columns, const Rectangle& to) {
    for (int64_t m = 0; m < to.rows; m++, sums += kColumns) {
        auto* y = reinterpret_cast<typename Format::Stored*>(to.begin + m * to.stride);
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; j += kLanes) {
            const Floats sum = __builtin_convertvector(load_as<Ints>(sums + j) - correction[m], Floats);
            const Floats scale = splat(input_scale[m]) * load_as<Floats>(columns.scale + j);
            finish<Format, kActivation>(y, j, columns.count, sum * scale + load_as<Floats>(columns.bias + j));
        }
    }
}

// y = activation(value * input scale + bias), in place of `dequantize` when the weight scales are in `values` already.
template <class Format, Activation kActivation, int kColumns>
void rescale(const float* values, const float* input_scale, const PanelColumns<kColumns>& columns,
             const Rectangle& to) {
    for (int64_t m = 0; m < to.rows; m++, values += kColumns) {
        auto* y = reinterpret_cast<typename Format::Stored*>(to.begin + m * to.stride);
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; j += kLanes)
            finish<Format, kActivation>(
                y, j, columns.count,
                load_as<Floats>(values + j) * splat(input_scale[m]) + load_as<Floats>(columns.bias + j));
    }
}

// f with the compile-time format and activation of a call as template arguments.
template <class F>
DSC_INLINE void with_activation(Activation activation, F&& f) {
    switch (activation) {
        case Activation::none:
            return f.template operator()<Activation::none>();
        case Activation::relu:
            return f.template operator()<Activation::relu>();
        case Activation::gelu_erf:
            return f.template operator()<Activation::gelu_erf>();
        case Activation::gelu_tanh:
            return f.template operator()<Activation::gelu_tanh>();
        case Activation::silu:
            return f.template operator()<Activation::silu>();
    }
}

template <class F>
DSC_INLINE void with_format(LinearType type, F&& f) {
    switch (type) {
        case LinearType::fp32:
            return f.template operator()<Fp32>();
        case LinearType::bf16:
            return f.template operator()<Bf16>();
        case LinearType::fp16:
            return f.template operator()<Fp16>();
    }
}

}  // namespace
}  // namespace ds_compress::cpu
