// CUDA's vocabulary for g++, as much as the kernels use: qualifiers, vector types, 16-bit floats, runtime calls.
// Arithmetic that must round once is in ds_compress/math.h, which needs nothing of CUDA on the CPU.
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

struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
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

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
    return ds_compress::emulator::bit_cast<float>(static_cast<unsigned>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    if (x != x) return {0x7fff};
    const unsigned bits = ds_compress::emulator::bit_cast<unsigned>(x);
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 0x3ff;
    float magnitude;
    if (exponent == 31) magnitude = fraction != 0 ? NAN : INFINITY;
    else if (exponent == 0) magnitude = std::ldexp(static_cast<float>(fraction), -24);
    else magnitude = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return std::copysign(magnitude, x.bits >> 15 ? -1.0f : 1.0f);
}
inline __half __float2half_rn(float x) {
    if (x != x) return {0x7fff};
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float magnitude = std::fabs(x);
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x1p-14f) {  // subnormal in half: a whole multiple of 2^-24
        return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24))))};
    }
    const unsigned bits = ds_compress::emulator::bit_cast<unsigned>(magnitude);
    const unsigned rounded = bits + 0xfff + ((bits >> 13) & 1);
    return {static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)))};
}

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned byte = bytes >> (selector >> 4 * i & 7) * 8 & 255;
        if ((selector >> 4 * i & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;  // prmt: the sign in all bits
        result |= byte << 8 * i;
    }
    return result;
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; i++) {
        const int left = static_cast<int8_t>(a >> 8 * i), right = static_cast<int8_t>(b >> 8 * i);
        sum = static_cast<int>(static_cast<unsigned>(sum) + static_cast<unsigned>(left * right));
    }
    return sum;
}

namespace ds_compress {
inline float approximate_reciprocal(float x) { return 1.0f / x; }
}  // namespace ds_compress
