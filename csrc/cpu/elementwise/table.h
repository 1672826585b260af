// The table of all kernels as this file's instruction set compiles them; the last include of such a .cpp.
#pragma once

#include "block.h"
#include "fake_quantize.h"
#include "fake_quantize_float.h"
#include "kernels.h"
#include "mask.h"
#include "select.h"
#include "squares.h"
#include "window.h"

namespace ds_compress::cpu {
namespace {

constexpr ElementwiseKernels kTable = {
    mask_apply,       mask_pack,        mask_unpack,   mask_n_of_m,           mask_window,
    mask_square_sums, measure,          fake_quantize, float_scales,          fake_quantize_float,
    block_quantize,   block_dequantize, block_reduce,  block_reduce_quantize,
};

}  // namespace
}  // namespace ds_compress::cpu
