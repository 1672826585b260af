// What stored bits stand for in the products: unsigned bytes. To be included in a .cpp of one instruction set.
#pragma once

#include "weight_only.h"

namespace ds_compress::cpu {
namespace {

constexpr int bits_of_storage(Storage storage) {
    return storage == Storage::int2 ? 2 : storage == Storage::int8 ? 8 : 4;
}

// Twice the numbers of E2M1, 12 more than they are: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
alignas(16) constexpr uint8_t kE2m1Values[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

template <Storage kStorage>
constexpr int value_of(int stored) {
    return kStorage == Storage::e2m1 ? kE2m1Values[stored] : stored;
}

}  // namespace
}  // namespace ds_compress::cpu
