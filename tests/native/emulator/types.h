// CUDA's vocabulary for g++: qualifiers, vector types, half-precision types, the few runtime calls we use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define DSC_VECTOR_TYPES(type, name)                   \
    struct alignas(2 * sizeof(type)) name##2 {         \
        type x, y;                                     \
    };                                                 \
    struct alignas(4 * sizeof(type)) name##4 {         \
        type x, y, z, w;                               \
    };                                                 \
    inline name##2 make_##name##2(type x, type y) {    \
        return {x, y};                                 \
    }                                                  \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
DSC_VECTOR_TYPES(float, float)
DSC_VECTOR_TYPES(int, int)
DSC_VECTOR_TYPES(unsigned, uint)
DSC_VECTOR_TYPES(short, short)
DSC_VECTOR_TYPES(unsigned short, ushort)
DSC_VECTOR_TYPES(signed char, char)
DSC_VECTOR_TYPES(unsigned char, uchar)
#undef DSC_VECTOR_TYPES
struct alignas(16) double2 {
    double x, y;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* start, int byte, size_t bytes, cudaStream_t) {
    std::memset(start, byte, bytes);
    return cudaSuccess;
}

// --- numbers -----------------------------------------------------------------------------------------------

namespace ds_compress::emulator {
template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
}  // namespace ds_compress::emulator

inline unsigned __float_as_uint(float x) { return ds_compress::emulator::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return ds_compress::emulator::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return ds_compress::emulator::bit_cast<float>(x); }
inline float __int_as_float(int x) { return ds_compress::emulator::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return ds_compress::emulator::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return ds_compress::emulator::bit_cast<double>(x); }

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float __half2float(__half x) {
    const unsigned sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 0x3ff;
    float magnitude;
    if (exponent == 31) magnitude = __uint_as_float(0x7f800000u | fraction << 13);
    else if (exponent == 0) magnitude = std::ldexp(static_cast<float>(fraction), -24);
    else magnitude = __uint_as_float((exponent + 112) << 23 | fraction << 13);
    return __uint_as_float(__float_as_uint(magnitude) | sign);
}
inline __half __float2half_rn(float x) {
    const uint16_t sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000u);
    if (x != x) return {0x7fff};
    const float magnitude = std::fabs(x);
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
    if (magnitude < 0x1p-14f) {  // subnormal in half: a multiple of 2^-24, rounded by the addition of 1.5 * 2^-1
        const float rounded = std::nearbyint(std::ldexp(magnitude, 24));
        return {static_cast<uint16_t>(sign | static_cast<uint16_t>(rounded))};
    }
    const unsigned bits = __float_as_uint(magnitude);
    const unsigned rounded = bits + 0xfff + ((bits >> 13) & 1);
    return {static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)))};
}

// Plain arithmetic: the build forbids contraction (-ffp-contract=off), so these round once, to nearest even.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
/// CUDA's conversion saturates and gives 0 for NaN, where C++ is undefined.
inline int __float2int_rn(float x) {
    if (x != x) return 0;
    if (x >= 0x1p31f) return INT32_MAX;
    return x <= -0x1p31f ? INT32_MIN : static_cast<int>(std::nearbyint(x));
}

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (x >> i & 1u) << (31 - i);
    return reversed;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; i++) {
        const int left = static_cast<int8_t>(a >> 8 * i), right = static_cast<int8_t>(b >> 8 * i);
        sum = static_cast<int>(static_cast<unsigned>(sum) + static_cast<unsigned>(left * right));
    }
    return sum;
}
template <class T>
inline T __ldg(const T* address) {
    return *address;
}
