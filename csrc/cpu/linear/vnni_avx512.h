// What the AVX-512 engines share. To be included in linear_avx512.cpp.
#pragma once

#include <immintrin.h>

#include "../elementwise/simd.h"

// sum += four unsigned bytes of `a` times four signed bytes of `b`, in every lane. In assembly because gcc 12 spills an
// array of sums that the intrinsic updates. tests/native/avx512_emulated.h defines it before this file where the
// instruction is not there.
#if !defined(DSC_VPDPBUSD)
#define DSC_VPDPBUSD(sum, a, b) asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))
#endif

namespace ds_compress::cpu {
namespace {

// The low byte of every lane.
DSC_INLINE void store_bytes(void* to, Ints values) {
    store(static_cast<uint8_t*>(to), _mm512_cvtepi32_epi8((__m512i)values));
}

}  // namespace
}  // namespace ds_compress::cpu
