// The scratch memory of a call, cut into arrays. To be included in a .cpp of one instruction set.
#pragma once

#include "ds_compress/packed.h"

namespace ds_compress::cpu {
namespace {

/// Takes arrays from `memory` one after the other, each aligned to 64 bytes; without memory it only counts.
class ScratchArrays {
public:
    explicit ScratchArrays(void* memory) : begin_(static_cast<uint8_t*>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        auto* taken = reinterpret_cast<T*>(begin_ + bytes_);
        bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return taken;
    }
    int64_t bytes() const { return bytes_; }

private:
    uint8_t* begin_;
    int64_t bytes_ = 0;
};

}  // namespace
}  // namespace ds_compress::cpu
