// The largest magnitudes of as many blocks as a vector has lanes, each in a lane of its own.
//
// To reduce one vector takes a shuffle and a maximum for every halving. Two vectors can be halved together: the halves
// of one go to the lower lanes, those of the other to the upper ones. A tree of that leaves one vector, which is the
// result, after two shuffles a block whatever the width.
// To be included in a .cpp of one instruction set.
#pragma once

#include <type_traits>

#include "halves.h"
#include "simd.h"

namespace ds_compress::cpu {
namespace {

// Of every run of 2 `half` lanes of `a` and of `b`, both halves joined: those of `a` in the lower half, of `b` in the
// upper.
template <int half>
DSC_INLINE Ints halved(Ints a, Ints b) {
    Ints first;
    for (int lane = 0; lane < kLanes; lane++) {
        const int begin = lane / (2 * half) * (2 * half), place = lane % (2 * half);
        first[lane] = place < half ? lane : kLanes + begin + place - half;
    }
    return larger(__builtin_shuffle(a, b, first), __builtin_shuffle(a, b, first + half));
}

// The largest magnitude as bits, so that NaN and Inf win: in some lane. `count` is a multiple of kLanes.
template <class Format>
DSC_INLINE Ints lane_maxima(const typename Format::Stored* x, int64_t count) {
    if constexpr (std::is_same_v<Format, Bf16>) {
        if (count % (2 * kLanes) == 0) {  // two in a word, whose bits are in the order of their values
            Ints largest = load_as<Ints>(x) & 0x7fff7fff;
            for (int64_t i = 2 * kLanes; i < count; i += 2 * kLanes)
                largest = larger_halves(largest, load_as<Ints>(x + i) & 0x7fff7fff);
            return larger(largest << 16, largest & 0x7fff0000);
        }
    }
    Ints largest = bits_of(Format::load(x)) & INT32_MAX;
    for (int64_t i = kLanes; i < count; i += kLanes)
        largest = larger(largest, bits_of(Format::load(x + i)) & INT32_MAX);
    return largest;
}

// Lane i: the largest magnitude of block i. The tree is walked to its leaves first, so
// that few vectors are held at a time. `block` is a multiple of kLanes.
template <class Format, int blocks = kLanes>
DSC_INLINE Ints block_maxima(const typename Format::Stored* x, int64_t block) {
    // A node stands for every `distance`-th block from its own on.
    constexpr int distance = kLanes / blocks;
    if constexpr (blocks == 1) {
        return lane_maxima<Format>(x, block);
    } else {
        return halved<distance>(block_maxima<Format, blocks / 2>(x, block),
                                block_maxima<Format, blocks / 2>(x + distance * block, block));
    }
}

}  // namespace
}  // namespace ds_compress::cpu
