#include <cstring>

#include "weight_only.h"

namespace ds_compress::cpu {
namespace {

// The bits of one value.
uint32_t stored_bits(const WeightOnlyWeight& weight, uint8_t value) {
    if (weight.storage == Storage::e2m1) return value & 15;
    if (weight.has_offset) return value;
    return static_cast<uint32_t>(static_cast<int8_t>(value) + weight.excess);
}

}  // namespace

void weight_only_pack(const uint8_t* values, const float* scale, const float* offset, const WeightOnlyWeight& weight,
                      Range panels, uint8_t* body) {
    const int64_t bits = weight.bits(), inputs_per_word = 32 / bits;
    for (int64_t panel = panels.begin; panel < panels.end; panel++) {
        uint8_t* to = body + panel * weight.panel_bytes();
        std::memset(to, 0, static_cast<size_t>(weight.panel_bytes()));
        for (int64_t group = 0; group < weight.groups; group++, to += weight.group_bytes()) {
            const int64_t first = group * weight.group_size;
            const int64_t left = weight.columns - first;
            const int64_t count = left < weight.group_size ? left : weight.group_size;
            for (int64_t column = 0; column < kWeightOnlyColumns; column++) {
                const int64_t row = panel * kWeightOnlyColumns + column;
                if (row >= weight.rows) break;
                std::memcpy(to + 4 * column, scale + row * weight.groups + group, 4);
                if (weight.has_offset)
                    std::memcpy(to + 4 * (kWeightOnlyColumns + column), offset + row * weight.groups + group, 4);
                uint8_t* words = to + weight.head_bytes() + 4 * column;
                const uint8_t* from = values + row * weight.columns + first;
                for (int64_t k = 0; k < count; k++) {
                    const int64_t word = k / inputs_per_word, part = k % inputs_per_word;
                    words[word * 4 * kWeightOnlyColumns + part % 4] |=
                        static_cast<uint8_t>(stored_bits(weight, from[k]) << (part / 4 * bits));
                }
            }
        }
    }
}

}  // namespace ds_compress::cpu
