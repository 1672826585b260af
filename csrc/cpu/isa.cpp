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

struct Amx {
    bool int8 = false, bf16 = false;
};

Amx find_amx() {
#if defined(__x86_64__) && defined(__linux__)
    const char* requested = std::getenv("DS_COMPRESS_CPU_ISA");
    if (isa() != Isa::avx512 || (requested != nullptr && *requested != '\0')) return {};
    unsigned a = 0, b = 0, c = 0, d = 0, d1 = 0, a1 = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1)) return {};
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return {};
    const bool avx512_bf16 = __get_cpuid_count(7, 1, &a1, &b, &c, &d1) && (a1 >> 5 & 1);
    return {.int8 = (d >> 25 & 1) != 0, .bf16 = (d >> 22 & 1) != 0 && avx512_bf16};
#else
    return {};
#endif
}

const Amx& amx() {
    static const Amx found = find_amx();
    return found;
}

}  // namespace

bool has_amx_int8() { return amx().int8; }
bool has_amx_bf16() { return amx().bf16; }

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
