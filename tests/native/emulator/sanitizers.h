// What the address and thread sanitizers must be told about fibers and shared memory; nothing in plain builds.
//
// ASan wants to know the stack in use. TSan sees every fiber as a thread of its own: switching creates no
// happens-before edge, only the emulator's barriers do, through `happens_before` and `happens_after`.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// The emulator's own bookkeeping is shared by all fibers on purpose: TSan is to watch the kernels only.
#define DSC_UNWATCHED __attribute__((no_sanitize("thread"), noinline))
#else
#define DSC_UNWATCHED
#endif

namespace ds_compress::emulator::sanitizers {

#if defined(__SANITIZE_THREAD__)
constexpr bool watches_threads = true;
inline void* current_thread() { return __tsan_get_current_fiber(); }
inline void* create_thread() { return __tsan_create_fiber(0); }
DSC_UNWATCHED inline void switch_thread(void* thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }
inline void happens_before(void* edge) { __tsan_release(edge); }
inline void happens_after(void* edge) { __tsan_acquire(edge); }
#else
constexpr bool watches_threads = false;
inline void* current_thread() { return nullptr; }
inline void* create_thread() { return nullptr; }
inline void switch_thread(void*) {}
inline void happens_before(void*) {}
inline void happens_after(void*) {}
#endif

#if defined(__SANITIZE_ADDRESS__)
inline void leave_stack(void** mine, const void* bottom, size_t bytes) {
    __sanitizer_start_switch_fiber(mine, bottom, bytes);
}
inline void enter_stack(void* mine, const void** left_bottom, size_t* left_bytes) {
    __sanitizer_finish_switch_fiber(mine, left_bottom, left_bytes);
}
inline void forbid(const void* start, size_t bytes) { __asan_poison_memory_region(start, bytes); }
inline void allow(const void* start, size_t bytes) { __asan_unpoison_memory_region(start, bytes); }
#else
inline void leave_stack(void**, const void*, size_t) {}
inline void enter_stack(void*, const void**, size_t*) {}
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
#endif

/// memset that no sanitizer sees, for memory that is not an object of the kernel yet.
DSC_UNWATCHED inline void fill_unseen(void* start, unsigned char byte, size_t bytes) {
#if defined(__x86_64__)
    asm volatile("rep stosb" : "+D"(start), "+c"(bytes) : "a"(byte) : "memory");
#else
    for (size_t i = 0; i < bytes; i++) static_cast<volatile unsigned char*>(start)[i] = byte;
#endif
}

}  // namespace ds_compress::emulator::sanitizers
