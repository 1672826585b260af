// The table of kernels of one instruction set. To be included in its .cpp.
#pragma once

#include "int4_driver.h"
#include "int8_driver.h"

namespace ds_compress::cpu {
namespace {

template <class Int8, class Int4>
constexpr LinearKernels table(Isa isa, int64_t int8_layout, int64_t int4_layout) {
    static_assert(Int8::kColumns == Int4::kColumns && 48 % Int8::kColumns == 0, "see packed_bytes");
    return {
        .isa = isa,
        .int8_layout = int8_layout,
        .int4_layout = int4_layout,
        .panel_columns = Int8::kColumns,
        .int8_panel_bytes = Int8::panel_bytes,
        .int4_panel_bytes = Int4::panel_bytes,
        .int8_pack = Int8::pack,
        .int8_quantize_pack = Int8::quantize_pack,
        .int8_linear = Int8::linear,
        .int4_pack = Int4::pack,
        .int4_linear = Int4::linear,
        .scratch_bytes =
            [](int64_t columns, int64_t groups) {
                const int64_t int8 = Int8::scratch_bytes(columns), int4 = Int4::scratch_bytes(columns, groups);
                return int8 > int4 ? int8 : int4;
            },
    };
}

}  // namespace
}  // namespace ds_compress::cpu
