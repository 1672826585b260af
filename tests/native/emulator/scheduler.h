// Runs a grid: blocks one after another, the threads of a block as fibers that give way at a barrier or a warp
// collective. Which of the ready fibers goes next is the `schedule`: 0 in order, negative in reverse, positive
// a seed by which the order is shuffled again and again. A right kernel gives the same result under all.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "arena.h"
#include "fiber.h"
#include "types.h"

namespace ds_compress::emulator {

enum class State : uint8_t { ready, at_collective, at_barrier, done };

struct Copy {  // one cp.async
    void* to;
    const void* from;  // nullptr: zeros
};

struct Thread {
    Fiber fiber;
    uint3 index{};
    int lane = 0, warp = 0;
    State state = State::done;
    std::vector<Copy> open_copies;                   // started, not committed
    std::vector<std::vector<Copy>> committed_copies;  // groups under way, oldest first
};

/// The lanes of one warp that wait for each other at a collective.
struct Meeting {
    uint32_t mask = 0, arrived = 0;
    int kind = 0;
    void* slots[32];
};
constexpr int meetings_per_warp = 8;  // disjoint masks may be under way at a time
constexpr int max_threads = 1024;

struct Statistics {
    uint64_t launches, blocks, switches, collectives, ldmatrix_phases, bank_conflicts;
};

struct Block {
    dim3 size, grid;
    uint3 index{};
    int thread_count = 0, live = 0, at_barrier = 0;
    unsigned barriers = 0;
    Thread* threads[max_threads];
    Meeting meetings[max_threads / 32][meetings_per_warp];
    char barrier_edges[2], warp_edges[max_threads / 32];  // TSan: what a barrier orders
    char launch_edge, end_edge;
    Fiber scheduler;
    Arena arena;
    void (*body)(void*) = nullptr;
    void* body_argument = nullptr;
};

inline Block* block = nullptr;    // the one that runs
inline Thread* self = nullptr;    // the thread that runs, null in the scheduler
inline Statistics statistics{};
inline int schedule = 0;

[[noreturn]] DSC_UNWATCHED inline void fail(const char* what) {
    const uint3 at = self != nullptr ? self->index : uint3{};
    std::fprintf(stderr, "emulator: %s, at block (%u, %u, %u) thread (%u, %u, %u)\n", what, block->index.x,
                 block->index.y, block->index.z, at.x, at.y, at.z);
    std::fflush(stderr);
    std::abort();
}

/// Back to the scheduler; returns when the scheduler chooses this thread again.
DSC_UNWATCHED inline void give_way(State state) {
    Thread* const me = self;
    me->state = state;
    switch_fiber(me->fiber, block->scheduler);
}

DSC_UNWATCHED inline void open_barrier() {
    block->at_barrier = 0;
    block->barriers++;
    for (int i = 0; i < block->thread_count; i++) {
        if (block->threads[i]->state == State::at_barrier) block->threads[i]->state = State::ready;
    }
}

/// __syncthreads: threads that have returned no longer count, as on hardware.
DSC_UNWATCHED inline void barrier() {
    char* const edge = &block->barrier_edges[block->barriers % 2];
    sanitizers::happens_before(edge);
    if (++block->at_barrier == block->live) open_barrier();
    else give_way(State::at_barrier);
    sanitizers::happens_after(edge);
}

/// What every fiber runs, for ever: the kernel for the thread and block that are set when it is resumed.
DSC_UNWATCHED inline void thread_main() {
    const void* bottom = nullptr;
    size_t bytes = 0;
    sanitizers::enter_stack(nullptr, &bottom, &bytes);
    if (bottom != nullptr) {
        block->scheduler.stack = static_cast<char*>(const_cast<void*>(bottom));
        block->scheduler.stack_bytes = bytes;
    }
    for (;;) {
        sanitizers::happens_after(&block->launch_edge);
        block->body(block->body_argument);
        sanitizers::happens_before(&block->end_edge);
        self->open_copies.clear();
        self->committed_copies.clear();
        block->live--;
        if (block->at_barrier > 0 && block->at_barrier == block->live) open_barrier();
        give_way(State::done);
    }
}

/// A small generator of our own: a schedule must not depend on the C++ library.
struct Shuffler {
    uint64_t state;
    DSC_UNWATCHED unsigned below(unsigned bound) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return static_cast<unsigned>((state >> 33) % bound);
    }
};

DSC_UNWATCHED inline void run_block(Shuffler& random) {
    Block& b = *block;
    Thread* order[max_threads];
    for (int i = 0; i < b.thread_count; i++) {
        order[schedule < 0 ? b.thread_count - 1 - i : i] = b.threads[i];
        b.threads[i]->state = State::ready;
    }
    b.live = b.thread_count;
    b.at_barrier = 0;
    b.arena.clear();
    while (b.live > 0) {
        for (int i = b.thread_count - 1; schedule > 0 && i > 0; i--) {
            const unsigned j = random.below(static_cast<unsigned>(i + 1));
            Thread* const other = order[j];
            order[j] = order[i];
            order[i] = other;
        }
        bool progress = false;
        for (int i = 0; i < b.thread_count; i++) {
            if (order[i]->state != State::ready) continue;
            progress = true;
            self = order[i];
            statistics.switches++;
            switch_fiber(b.scheduler, self->fiber);
            self = nullptr;
        }
        if (progress) continue;
        // All that still run wait. Not at the barrier, which would have opened: so at a collective.
        for (int i = 0; i < b.thread_count; i++) {
            if (order[i]->state == State::at_collective) self = order[i];
        }
        fail("deadlock: a warp collective is not reached by every lane of its mask");
    }
    statistics.blocks++;
}

/// Two sets of fibers under TSan: threads of neighbouring blocks are then strangers to each other, and two
/// blocks that touch the same memory without atomics are a race, as on hardware.
DSC_UNWATCHED inline Thread* thread_at(unsigned set, int i) {
    static Thread* pool[2][max_threads];
    Thread*& thread = pool[sanitizers::watches_threads ? set % 2 : 0][i];
    if (thread == nullptr) {
        thread = new Thread();
        prepare(thread->fiber, thread_main);
    }
    return thread;
}

DSC_UNWATCHED inline void run_grid(dim3 grid, dim3 size, size_t shared_bytes, void (*body)(void*),
                                   void* argument) {
    // Never freed: TSan must not meet an old edge or block at a new one's address.
    block = new Block();
    const size_t threads = static_cast<size_t>(size.x) * size.y * size.z;
    if (threads == 0 || threads > max_threads) fail("a block has 1 to 1024 threads");
    block->size = size;
    block->grid = grid;
    block->thread_count = static_cast<int>(threads);
    block->body = body;
    block->body_argument = argument;
    block->scheduler.tsan_thread = sanitizers::current_thread();
    Shuffler random{static_cast<uint64_t>(schedule)};
    unsigned number = 0;
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++, number++) {
                block->index = {x, y, z};
                block->arena.reserve(shared_bytes);
                sanitizers::happens_before(&block->launch_edge);  // of the memory and of what came before the launch
                for (unsigned i = 0; i < threads; i++) {
                    Thread* const thread = thread_at(number, static_cast<int>(i));
                    thread->index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
                    thread->lane = static_cast<int>(i % 32);
                    thread->warp = static_cast<int>(i / 32);
                    block->threads[i] = thread;
                }
                run_block(random);
                // TSan would see the next block's threads race with this one's: they get other memory.
                if (sanitizers::watches_threads) block->arena.release();
            }
        }
    }
    if (!sanitizers::watches_threads) block->arena.release();
    sanitizers::happens_after(&block->end_edge);
    statistics.launches++;
}

}  // namespace ds_compress::emulator
