// The instructions of AMX, written out, since they need no flags of the compiler's so. For CPUs of `has_amx_*`.
//
// A tile is 16 rows of 64 bytes. tests/native/amx_emulated.h defines the same functions in plain C++.
#pragma once

#include <cstdint>

namespace ds_compress::cpu {
namespace {

constexpr int64_t kTileBytes = 1024, kTileRows = 16, kTileRowBytes = 64;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

#if !defined(DSC_AMX_EMULATED)
/// This thread's eight tiles, all of them whole, while it lives.
struct Tiles {
    Tiles() {
        const TileConfig config;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
};

// Rows of memory are `stride` bytes apart, which may be 0.
template <int kTile>
inline __attribute__((always_inline)) void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0, %1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline __attribute__((always_inline)) void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0, %1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

// int32 (16, 16) += uint8 (16, 64) times int8 (64, 16), whose rows of four lie side by side.
template <int kSum, int kUnsigned, int kSigned>
inline __attribute__((always_inline)) void multiply_tiles_u8s8() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kUnsigned), "i"(kSigned));
}
#endif

}  // namespace
}  // namespace ds_compress::cpu
