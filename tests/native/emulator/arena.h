// The shared memory of a block: one arena, in which every array lies between gaps that ASan forbids. A fresh
// block finds garbage in it, never the zeros or the leftovers that would hide a missing initialisation.
#pragma once

#include <cstdio>
#include <cstdlib>

#include <sys/mman.h>

#include "sanitizers.h"

namespace ds_compress::emulator {

constexpr size_t shared_memory_limit = 99 << 10;  // a block of sm_86 and sm_89, which run sm_80 binaries
constexpr unsigned char garbage = 0xCD;

class Arena {
public:
    /// Memory for a block whose launch asks for `dynamic_bytes`.
    DSC_UNWATCHED void reserve(size_t dynamic_bytes) {
        dynamic_bytes_ = dynamic_bytes;
        if (memory_ != nullptr) return;
        void* const memory =
            mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            std::perror("emulator: no shared memory");
            std::abort();
        }
        memory_ = static_cast<unsigned char*>(memory);
    }

    /// Forgets the arrays; all is garbage again.
    DSC_UNWATCHED void clear() {
        sanitizers::allow(memory_, capacity);
        sanitizers::fill_unseen(memory_, garbage, high_water_);
        sanitizers::forbid(memory_, capacity);
        used_ = gap;
        taken_ = high_water_ = 0;
        arrays_ = 0;
        dynamic_ = allocate(dynamic_bytes_);
    }

    DSC_UNWATCHED void release() {
        sanitizers::allow(memory_, capacity);
        munmap(memory_, capacity);
        memory_ = nullptr;
        high_water_ = capacity;
    }

    DSC_UNWATCHED unsigned char* dynamic() { return dynamic_; }
    DSC_UNWATCHED size_t dynamic_bytes() { return dynamic_bytes_; }

    /// The array that belongs to `site`, an address that stands for its declaration: every thread of the block
    /// gets the same. Null when the block has no such memory left.
    DSC_UNWATCHED unsigned char* array(const void* site, size_t bytes) {
        for (int i = 0; i < arrays_; i++) {
            if (sites_[i] == site) return starts_[i];
        }
        if (arrays_ == max_arrays) return nullptr;
        sites_[arrays_] = site;
        return starts_[arrays_++] = allocate(bytes);
    }

private:
    DSC_UNWATCHED unsigned char* allocate(size_t bytes) {
        taken_ += bytes;
        if (taken_ > shared_memory_limit || used_ + bytes + 2 * gap > capacity) return nullptr;
        unsigned char* const start = memory_ + used_;
        sanitizers::allow(start, bytes);
        used_ += (bytes + gap - 1) / gap * gap + gap;
        if (used_ > high_water_) high_water_ = used_;
        return start;
    }

    static constexpr size_t gap = 256, capacity = 256 << 10;
    static constexpr int max_arrays = 32;
    unsigned char* memory_ = nullptr;
    unsigned char* dynamic_ = nullptr;
    unsigned char* starts_[max_arrays];
    const void* sites_[max_arrays];
    size_t used_ = 0, taken_ = 0, high_water_ = capacity, dynamic_bytes_ = 0;
    int arrays_ = 0;
};

}  // namespace ds_compress::emulator
