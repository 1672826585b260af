// A fiber: a stack and the place where it goes on. Switching by hand costs a few ns; ucontext, the portable
// fallback (any other processor, or -DDSC_UCONTEXT), asks the kernel for the signal mask every time.
#pragma once

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "sanitizers.h"

#if !defined(__x86_64__) && !defined(DSC_UCONTEXT)
#define DSC_UCONTEXT
#endif
#if defined(DSC_UCONTEXT)
#include <ucontext.h>
#endif

namespace ds_compress::emulator {

struct Fiber {
    char* stack = nullptr;
    size_t stack_bytes = 0;
    void* asan_stack = nullptr;   // ASan's handle while the fiber is left
    void* tsan_thread = nullptr;  // TSan's handle
#if defined(DSC_UCONTEXT)
    ucontext_t context;
#else
    void* stack_pointer = nullptr;
#endif
};

#if !defined(DSC_UCONTEXT)
// Saves the registers that a call preserves on the old stack and takes them from the new one.
extern "C" void dsc_switch_stack(void** save, void* load);
asm(R"(
    .text
    .weak dsc_switch_stack
    .type dsc_switch_stack, @function
dsc_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size dsc_switch_stack, . - dsc_switch_stack
)");
#endif

/// Readies `fiber` to run `entry`, which must never return. The stack is allocated once and reused.
DSC_UNWATCHED inline void prepare(Fiber& fiber, void (*entry)()) {
    if (fiber.stack == nullptr) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
        fiber.stack_bytes = 256 << 10;
#else
        fiber.stack_bytes = 64 << 10;
#endif
        void* const memory = mmap(nullptr, fiber.stack_bytes, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            std::perror("emulator: no memory for a fiber's stack");
            std::abort();
        }
        fiber.stack = static_cast<char*>(memory);
        fiber.tsan_thread = sanitizers::create_thread();
    }
#if defined(DSC_UCONTEXT)
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = fiber.stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#else
    // As if `entry` had been called (return address on a 16-byte boundary) and had pushed six registers.
    void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.stack_pointer = top;
#endif
}

/// Leaves `from` and goes on where `to` was left.
DSC_UNWATCHED inline void switch_fiber(Fiber& from, Fiber& to) {
    sanitizers::leave_stack(&from.asan_stack, to.stack, to.stack_bytes);
    sanitizers::switch_thread(to.tsan_thread);
#if defined(DSC_UCONTEXT)
    swapcontext(&from.context, &to.context);
#else
    dsc_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
    sanitizers::enter_stack(from.asan_stack, nullptr, nullptr);
}

}  // namespace ds_compress::emulator
