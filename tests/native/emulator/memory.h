// Asynchronous copies, and atomics (relaxed, as CUDA's: they order nothing else).
//
// A copy is as unkind as hardware may be: its destination is garbage from the moment it is started, and the
// bytes are read and arrive only when a wait demands them.
#pragma once

#include "scheduler.h"

namespace ds_compress::emulator {

struct alignas(16) Chunk {
    uint64_t low, high;
};

DSC_UNWATCHED inline void remember_copy(void* to, const void* from) { self->open_copies.push_back({to, from}); }

DSC_UNWATCHED inline void close_group() {
    self->committed_copies.push_back(self->open_copies);
    self->open_copies.clear();
}

/// The next copy to carry out while more than `pending` groups are under way; false when there is none.
DSC_UNWATCHED inline bool next_copy(size_t pending, Copy& copy) {
    auto& groups = self->committed_copies;
    while (groups.size() > pending) {
        if (groups.front().empty()) {
            groups.erase(groups.begin());
            continue;
        }
        copy = groups.front().back();
        groups.front().pop_back();
        return true;
    }
    return false;
}

inline void check_aligned(const void* address, size_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail(what);
}

}  // namespace ds_compress::emulator

namespace ds_compress {

// Not DSC_UNWATCHED: these are the kernel's own reads and writes, which the sanitizers must see.
inline void copy_async_16(void* shared, const void* global, bool valid) {
    emulator::check_aligned(shared, 16, "cp.async to an address that is not 16-byte aligned");
    emulator::check_aligned(global, 16, "cp.async from an address that is not 16-byte aligned");
    *static_cast<emulator::Chunk*>(shared) = {0xA5A5A5A5A5A5A5A5ull, 0xA5A5A5A5A5A5A5A5ull};
    emulator::remember_copy(shared, valid ? global : nullptr);
}

inline void commit_copies() { emulator::close_group(); }

template <int pending>
inline void wait_copies() {
    emulator::Copy copy;
    while (emulator::next_copy(pending, copy)) {
        auto* const to = static_cast<emulator::Chunk*>(copy.to);
        if (copy.from != nullptr) *to = *static_cast<const emulator::Chunk*>(copy.from);
        else *to = {0, 0};
    }
}

template <class Word>
inline Word load_wide(const void* from) {
    emulator::check_aligned(from, sizeof(Word), "a wide load from a misaligned address");
    return *static_cast<const Word*>(from);
}

template <class Word>
inline void store_wide(void* to, Word word) {
    emulator::check_aligned(to, sizeof(Word), "a wide store to a misaligned address");
    *static_cast<Word*>(to) = word;
}

template <class Word>
inline Word load_passing(const void* from) {
    return load_wide<Word>(from);
}
template <class Word>
inline void store_passing(void* to, Word word) {
    store_wide(to, word);
}

inline uint32_t permute(uint32_t word, uint32_t selector) { return __byte_perm(word, 0, selector); }

inline uint32_t pair_of(float low, float high, __nv_bfloat16) {
    return __float2bfloat16_rn(low).bits | static_cast<uint32_t>(__float2bfloat16_rn(high).bits) << 16;
}
inline uint32_t pair_of(float low, float high, __half) {
    return __float2half_rn(low).bits | static_cast<uint32_t>(__float2half_rn(high).bits) << 16;
}

// The NaN that CUDA makes.
inline float smaller(float a, float b) {
    return a != a || b != b ? emulator::bit_cast<float>(0x7fffffffu) : b < a ? b : a;
}
inline float larger(float a, float b) {
    return a != a || b != b ? emulator::bit_cast<float>(0x7fffffffu) : a < b ? b : a;
}

}  // namespace ds_compress

template <class T>
inline T atomicAdd(T* address, T value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
inline T atomicMax(T* address, T value) {
    T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (seen < value &&
           !__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return seen;
}
template <class T>
inline T atomicMin(T* address, T value) {
    T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (value < seen &&
           !__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return seen;
}
