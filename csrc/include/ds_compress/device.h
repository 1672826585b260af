// The one header of the kernels that knows both worlds: CUDA, when nvcc compiles it, and the emulator of
// tests/native/emulator, when g++ does. A kernel includes this file and nothing else of CUDA, so the same
// source runs on a GPU and, one fiber per CUDA thread, on a CPU.
//
// Beyond CUDA's own names (threadIdx, __shfl_xor_sync, atomicAdd ...; the emulator has those that kernels use so
// far) and the arithmetic of math.h, a kernel uses
//   launch(kernel, grid, block, shared_bytes, stream, arguments...)   returns the launch's cudaError_t
//   DSC_SHARED(type, name, count)      a shared array of a block
//   DSC_DYNAMIC_SHARED(type, name)     the launch's shared_bytes
//   ldmatrix_x4, mma_s8_16x8x32                                       tensor cores, sm_80 and later
//   copy_async_16, commit_copies, wait_copies<pending>                global to shared without registers
//   multiprocessors()                  on the host, for the size of a grid
//   approximate_reciprocal             within a unit in the last place
//   to_float, from_float<T>            fp32, bf16, fp16; rounds to nearest even
//   load_wide, store_wide<Word>        4, 8 or 16 aligned bytes of global memory in one access;
//   load_passing, store_passing        the same, for what no cache need keep
//   pair_of                            two bf16 or fp16 values in a word
//   permute                            bytes of a word, or their signs
//   smaller, larger                    of two floats; a NaN wins
// Never __shared__ or <<< >>>: the emulator would not see them.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ds_compress/cuda_device.h"

#define DSC_DEVICE __device__ __forceinline__
#define DSC_SHARED(type, name, count) __shared__ type name[count]
#define DSC_DYNAMIC_SHARED(type, name)                                          \
    extern __shared__ __align__(128) unsigned char dsc_dynamic_shared_memory[]; \
    type* const name = reinterpret_cast<type*>(dsc_dynamic_shared_memory)

namespace ds_compress {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
    if (shared_bytes > 16 * 1024) {  // with what a kernel declares itself, more than 48 KB have to be asked for
        const cudaError_t refused =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        if (refused != cudaSuccess) return refused;
    }
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
    return cudaGetLastError();
}

/// Four 8x8 matrices of 16-bit elements, here 8 rows of 16 bytes each: lane l names row l % 8 of matrix l / 8
/// and receives bytes 4 (l % 4) .. + 3 of row l / 4 of every matrix. Rows are 16-byte aligned.
DSC_DEVICE void ldmatrix_x4(uint32_t (&rows)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(rows[0]), "=r"(rows[1]), "=r"(rows[2]), "=r"(rows[3])
                 : "r"(address)
                 : "memory");
}

/// sums (16x8, int32) += a (16x32, int8, row-major) . b (32x8, int8, column-major), by a whole warp.
DSC_DEVICE void mma_s8_16x8x32(int (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Starts to copy 16 bytes, both ends 16-byte aligned; with `valid` false nothing is read and zeros arrive.
DSC_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

/// 1 / x within one unit in the last place; 0 where that is subnormal. Only where a bound is promised, not bits.
DSC_DEVICE float approximate_reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

/// Closes the group of the copies that this thread started since the last call.
DSC_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `pending` of this thread's groups are under way. Other threads' copies: a barrier.
template <int pending>
DSC_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/// Of the current device.
inline int multiprocessors() {
    int device = 0;
    return cudaGetDevice(&device) == cudaSuccess ? multiprocessors(device) : 1;
}

/// uint32_t, uint2 or uint4 from an address that is a multiple of its size.
template <class Word>
DSC_DEVICE Word load_wide(const void* from) {
    return *static_cast<const Word*>(from);
}

template <class Word>
DSC_DEVICE void store_wide(void* to, Word word) {
    *static_cast<Word*>(to) = word;
}

/// The same for what is read or written once, by this kernel alone: other lines stay in the caches rather than these.
template <class Word>
DSC_DEVICE Word load_passing(const void* from) {
    return __ldcs(static_cast<const Word*>(from));
}

template <class Word>
DSC_DEVICE void store_passing(void* to, Word word) {
    __stcs(static_cast<Word*>(to), word);
}

/// Byte i of the result is byte (selector >> 4 i & 3) of `word`, or its sign in all bits where 8 is added.
DSC_DEVICE uint32_t permute(uint32_t word, uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(word), "r"(selector));
    return result;
}

DSC_DEVICE float smaller(float a, float b) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

DSC_DEVICE float larger(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

/// Two values in a word, the first in the low half.
DSC_DEVICE uint32_t pair_of(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
}
DSC_DEVICE uint32_t pair_of(float low, float high, __half) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
}

}  // namespace ds_compress

#else

#include "emulator/emulator.h"  // -I tests/native

#define DSC_DEVICE inline __attribute__((always_inline))

#endif

namespace ds_compress {

DSC_DEVICE float to_float(float value) { return value; }
DSC_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
DSC_DEVICE float to_float(__half value) { return __half2float(value); }

template <class T>
DSC_DEVICE T from_float(float value);
template <>
DSC_DEVICE float from_float<float>(float value) {
    return value;
}
template <>
DSC_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
DSC_DEVICE __half from_float<__half>(float value) {
    return __float2half_rn(value);
}

}  // namespace ds_compress
