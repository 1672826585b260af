// Warp collectives as meetings: every lane of the mask arrives with a slot, the last one does the work for all.
// Checked as compute-sanitizer's synccheck would: the caller is in its mask, all lanes of the mask come to the
// same kind of collective with the same mask, no lane reads one outside the mask, and all of them come at all.
#pragma once

#include "scheduler.h"

namespace ds_compress::emulator {

enum Kind { shuffle = 1, reduction, sync_warp, load_matrix, multiply };

template <class Work>
DSC_UNWATCHED inline void meet(uint32_t mask, int kind, void* slot, Work work) {
    Thread* const me = self;
    Meeting* const meetings = block->meetings[me->warp];
    if ((mask >> me->lane & 1) == 0) fail("the calling lane is not in the mask of its warp collective");
    Meeting *mine = nullptr, *vacant = nullptr;
    for (int i = 0; i < meetings_per_warp; i++) {
        Meeting& meeting = meetings[i];
        if (meeting.arrived == 0) vacant = &meeting;
        else if (meeting.mask == mask) mine = &meeting;
        else if ((meeting.mask & mask) != 0) fail("two collectives with overlapping masks under way in a warp");
    }
    if (mine == nullptr) {
        if (vacant == nullptr) fail("too many collectives under way in a warp");
        mine = vacant;
        mine->mask = mask;
        mine->kind = kind;
    }
    if (mine->kind != kind) fail("the lanes of a warp meet at different collectives (divergence)");
    mine->slots[me->lane] = slot;
    mine->arrived |= 1u << me->lane;
    statistics.collectives++;
    if (mine->arrived != mask) return give_way(State::at_collective);
    work(mine->slots, mask);
    mine->arrived = 0;
    for (int lane = 0; lane < 32; lane++) {
        const int i = me->warp * 32 + lane;
        if ((mask >> lane & 1) == 0 || lane == me->lane) continue;
        block->threads[i]->state = State::ready;
    }
}

template <class T>
struct Exchange {
    T given, taken;
    int source;
};

template <class T>
DSC_UNWATCHED inline T exchange(uint32_t mask, T value, int source) {
    Exchange<T> mine{value, value, source};
    meet(mask, shuffle + 16 * static_cast<int>(sizeof(T)), &mine, [](void** slots, uint32_t present) DSC_UNWATCHED {
        for (int lane = 0; lane < 32; lane++) {
            if ((present >> lane & 1) == 0) continue;
            auto* const taker = static_cast<Exchange<T>*>(slots[lane]);
            if ((present >> taker->source & 1) == 0) fail("a shuffle reads a lane outside its mask");
            taker->taken = static_cast<Exchange<T>*>(slots[taker->source])->given;
        }
    });
    return mine.taken;
}

struct Poll {
    uint32_t mine, sum, most;
};

/// Every lane learns the sum and the maximum of `value`.
DSC_UNWATCHED inline Poll poll(uint32_t mask, uint32_t value) {
    Poll mine{value, 0, 0};
    meet(mask, reduction, &mine, [](void** slots, uint32_t present) DSC_UNWATCHED {
        uint32_t sum = 0, most = 0;
        for (int lane = 0; lane < 32; lane++) {
            if ((present >> lane & 1) == 0) continue;
            const uint32_t given = static_cast<Poll*>(slots[lane])->mine;
            sum += given;
            most = max(most, given);
        }
        for (int lane = 0; lane < 32; lane++) {
            if ((present >> lane & 1) == 0) continue;
            static_cast<Poll*>(slots[lane])->sum = sum;
            static_cast<Poll*>(slots[lane])->most = most;
        }
    });
    return mine;
}

DSC_UNWATCHED inline int my_lane() { return self->lane; }

}  // namespace ds_compress::emulator

inline void __syncthreads() { ds_compress::emulator::barrier(); }

/// The one warp collective that orders memory.
DSC_UNWATCHED inline void __syncwarp(uint32_t mask = ~0u) {
    using namespace ds_compress::emulator;
    char* const edge = &block->warp_edges[self->warp];
    sanitizers::happens_before(edge);
    meet(mask, sync_warp, nullptr, [](void**, uint32_t) {});
    sanitizers::happens_after(edge);
}

template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int distance, int width = 32) {
    const int me = ds_compress::emulator::my_lane(), source = me ^ distance;
    return ds_compress::emulator::exchange(mask, value, source / width == me / width ? source : me);
}

inline unsigned __reduce_max_sync(uint32_t mask, unsigned x) { return ds_compress::emulator::poll(mask, x).most; }
inline unsigned __reduce_add_sync(uint32_t mask, unsigned x) { return ds_compress::emulator::poll(mask, x).sum; }
inline int __reduce_add_sync(uint32_t mask, int x) {
    return static_cast<int>(ds_compress::emulator::poll(mask, static_cast<unsigned>(x)).sum);
}
