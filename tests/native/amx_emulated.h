// The functions of csrc/cpu/amx.h in plain C++, from the description of AMX in Intel's manual (Software Developer's
// Manual, volume 2), so that the source for its tiles runs on any x86-64. Forced in front of a file with -include.
#pragma once

#include <cstdint>
#include <cstring>

#define DSC_AMX_EMULATED 1

namespace ds_compress::cpu {
namespace {

struct EmulatedTile {
    uint8_t row[16][64];
};
thread_local EmulatedTile emulated_tiles[8];

// As LDTILECFG does, it makes all tiles zero; what is left in them is poison.
struct Tiles {
    Tiles() { std::memset(emulated_tiles, 0, sizeof emulated_tiles); }
    ~Tiles() { std::memset(emulated_tiles, 0xa5, sizeof emulated_tiles); }
    Tiles(const Tiles&) = delete;
};

template <int kTile>
void load_tile(const void* from, int64_t stride) {
    for (int i = 0; i < 16; i++)
        std::memcpy(emulated_tiles[kTile].row[i], static_cast<const uint8_t*>(from) + i * stride, 64);
}

template <int kTile>
void store_tile(void* to, int64_t stride) {
    for (int i = 0; i < 16; i++) std::memcpy(static_cast<uint8_t*>(to) + i * stride, emulated_tiles[kTile].row[i], 64);
}

template <int kSum, int kUnsigned, int kSigned>
void multiply_tiles_u8s8() {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            int32_t sum;
            std::memcpy(&sum, emulated_tiles[kSum].row[i] + 4 * j, 4);
            for (int k = 0; k < 64; k++)
                sum += emulated_tiles[kUnsigned].row[i][k] *
                       static_cast<int8_t>(emulated_tiles[kSigned].row[k / 4][4 * j + k % 4]);
            std::memcpy(emulated_tiles[kSum].row[i] + 4 * j, &sum, 4);
        }
}

}  // namespace
}  // namespace ds_compress::cpu
