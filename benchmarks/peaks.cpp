// What one core can do at most: the instructions that int8 products are made of, and reading. Built by peaks.py.
//
// Twelve or twenty-four independent chains of one instruction with register operands; nothing else is in the loop.
#include <cstdint>
#include <cstdlib>

#define EXPORT extern "C" __attribute__((visibility("default")))

// clang-format off
#if defined(__AVX512F__)
#define REGISTER "zmm"
constexpr double kBytes = 64;
#define CLOBBERED                                                                                                    \
    "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13"
#else
#define REGISTER "ymm"
constexpr double kBytes = 32;
#define CLOBBERED                                                                                                    \
    "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13"
#endif

#define ONE(name, i) name " %%" REGISTER "12, %%" REGISTER "13, %%" REGISTER #i "\n\t"
#define TWELVE(name)                                                                                                 \
    ONE(name, 0) ONE(name, 1) ONE(name, 2) ONE(name, 3) ONE(name, 4) ONE(name, 5)                                    \
    ONE(name, 6) ONE(name, 7) ONE(name, 8) ONE(name, 9) ONE(name, 10) ONE(name, 11)
#define REPEAT(name)                                                                                                 \
    for (int64_t i = 0; i < times; i++) asm volatile(TWELVE(name)::: CLOBBERED)
// clang-format on

// Each returns the operations done, a product and its addition counting as two.
EXPORT double dsc_peak_fp32(int64_t times) {
    REPEAT("vfmadd231ps");
    return 2.0 * 12 * times * kBytes / 4;
}

EXPORT double dsc_peak_int8(int64_t times) {
#if defined(__AVX512VNNI__)
    REPEAT("vpdpbusd");
    return 2.0 * 12 * times * kBytes;
#else
    // Exact products without VNNI: 16-bit operands, two to a 32-bit sum.
    REPEAT("vpmaddwd");
    return 2.0 * 12 * times * kBytes / 2;
#endif
}

EXPORT double dsc_peak_int4(int64_t times) {
#if defined(__AVX512VNNI__)
    REPEAT("vpdpbusd");
#else
    REPEAT("vpmaddubsw");
#endif
    return 2.0 * 12 * times * kBytes;
}

// Bytes read in `times` passes over `bytes` (a multiple of 512) at `from`.
EXPORT double dsc_peak_read(int64_t times, const char* from, int64_t bytes) {
    for (int64_t t = 0; t < times; t++)
        for (const char* at = from; at < from + bytes; at += 512)
            asm volatile(
                "vpxor 0(%0), %%ymm0, %%ymm0\n\tvpxor 32(%0), %%ymm1, %%ymm1\n\t"
                "vpxor 64(%0), %%ymm2, %%ymm2\n\tvpxor 96(%0), %%ymm3, %%ymm3\n\t"
                "vpxor 128(%0), %%ymm0, %%ymm0\n\tvpxor 160(%0), %%ymm1, %%ymm1\n\t"
                "vpxor 192(%0), %%ymm2, %%ymm2\n\tvpxor 224(%0), %%ymm3, %%ymm3\n\t"
                "vpxor 256(%0), %%ymm0, %%ymm0\n\tvpxor 288(%0), %%ymm1, %%ymm1\n\t"
                "vpxor 320(%0), %%ymm2, %%ymm2\n\tvpxor 352(%0), %%ymm3, %%ymm3\n\t"
                "vpxor 384(%0), %%ymm0, %%ymm0\n\tvpxor 416(%0), %%ymm1, %%ymm1\n\t"
                "vpxor 448(%0), %%ymm2, %%ymm2\n\tvpxor 480(%0), %%ymm3, %%ymm3" ::"r"(at)
                : "ymm0", "ymm1", "ymm2", "ymm3", "memory");
    return static_cast<double>(times) * static_cast<double>(bytes);
}
