#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ds_compress::cpu {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512};

bool is_supported(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    switch (isa) {
        case Isa::scalar:
            return true;
        case Isa::avx2:
            return avx2;
        case Isa::avx512:
            return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512vnni");
    }
    return false;
#else
    return isa == Isa::scalar;
#endif
}

Isa choose() {
    const char* requested = std::getenv("DS_COMPRESS_CPU_ISA");
    if (requested == nullptr || *requested == '\0') {
        Isa best = Isa::scalar;
        for (Isa candidate : kAll)
            if (is_supported(candidate)) best = candidate;
        return best;
    }
    for (Isa candidate : kAll) {
        if (std::strcmp(requested, name_of(candidate)) != 0) continue;
        if (is_supported(candidate)) return candidate;
        throw std::runtime_error("DS_COMPRESS_CPU_ISA=" + std::string(requested) + ": this CPU does not have it");
    }
    throw std::runtime_error("DS_COMPRESS_CPU_ISA=" + std::string(requested) + ": allowed are scalar, avx2 and avx512");
}

bool find_amx_bf16() {
#if defined(__x86_64__) && defined(__linux__)
    const char* requested = std::getenv("DS_COMPRESS_CPU_ISA");
    if (isa() != Isa::avx512 || (requested != nullptr && *requested != '\0')) return false;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool has_tiles = (d >> 24 & 1) && (d >> 22 & 1);
    if (!has_tiles || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;  // AVX512_BF16
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace

bool has_amx_bf16() {
    static const bool found = find_amx_bf16();
    return found;
}

Isa isa() {
    static const Isa chosen = choose();
    return chosen;
}

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::scalar:
            return "scalar";
        case Isa::avx2:
            return "avx2";
        case Isa::avx512:
            return "avx512";
    }
    return "unknown";
}

}  // namespace ds_compress::cpu
