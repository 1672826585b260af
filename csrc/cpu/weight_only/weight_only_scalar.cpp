// Compiled for any CPU: plain loops that the compiler vectorizes for its baseline.
#include "driver.h"
#include "values.h"

namespace ds_compress::cpu {
namespace {

struct ScalarEngine {
    static constexpr int64_t kRows = 1;

    static void transpose(Ints bytes, uint8_t* to) {
        static_assert(kLanes == 4, "one quad");
        for (int i = 0; i < 4; i++)
            for (int byte = 0; byte < 4; byte++) to[4 * byte + i] = static_cast<uint8_t>(bytes[i] >> (8 * byte));
    }

    template <Storage kStorage, int kBytes>
    static void tile(const Tile& tile) {
        constexpr int kBits = bits_of_storage(kStorage), kParts = 8 / kBits;
        for_blocks<4 * kParts>(
            tile, [&](const uint8_t* words, int64_t count, int64_t block, int64_t quad, const float* scales) {
                const BlockHead& head = tile.heads[block];
                for (int j = 0; j < kWeightOnlyColumns; j += kLanes) {
                    Ints sums[kBytes];
                    for (int byte = 0; byte < kBytes; byte++) sums[byte] = splat(head.from[byte]);
                    for (int64_t word = 0; word < count; word++)
                        for (int part = 0; part < kParts; part++) {
                            const uint8_t* x = tile.x + (quad + word * kParts + part) * kQuadBytes;
                            for (int lane = 0; lane < kLanes; lane++) {
                                const uint8_t* w = words + (word * kWeightOnlyColumns + j + lane) * 4;
                                for (int i = 0; i < 4; i++) {
                                    const int value = value_of<kStorage>((w[i] >> (part * kBits)) & ((1 << kBits) - 1));
                                    for (int byte = 0; byte < kBytes; byte++)
                                        sums[byte][lane] += value * static_cast<int8_t>(x[4 * byte + i]);
                                }
                            }
                        }
                    add_block<kBytes>(sums, head, scales + j, tile.weight->has_offset, tile.values + j);
                }
            });
    }
};

}  // namespace

const WeightOnlyKernels* weight_only_scalar() {
    static constexpr WeightOnlyKernels kTable = weight_only_table<ScalarEngine>(Isa::scalar);
    return &kTable;
}

}  // namespace ds_compress::cpu
