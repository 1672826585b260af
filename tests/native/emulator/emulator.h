// CUDA on the CPU: compiles a kernel's source as C++ and runs one fiber per CUDA thread. What it is for, and
// what it finds, is in README.md; what a kernel may use is in ds_compress/device.h, which includes this file.
//
//   types.h        CUDA's types and arithmetic      scheduler.h    blocks, threads, barriers, deadlocks
//   sanitizers.h   what ASan and TSan are told      collectives.h  shuffles, votes: meetings of a warp
//   fiber.h        stacks and switching             memory.h       cp.async, atomics
//   arena.h        shared memory with gaps          tensor_core.h  ldmatrix, mma, mma.sp
#pragma once

#define DSC_EMULATOR

#include <dlfcn.h>

#include <tuple>
#include <type_traits>

#include "collectives.h"
#include "memory.h"
#include "scheduler.h"
#include "tensor_core.h"
#include "types.h"

#define threadIdx (ds_compress::emulator::thread_index())
#define blockIdx (ds_compress::emulator::block_index())
#define blockDim (ds_compress::emulator::block_size())
#define gridDim (ds_compress::emulator::grid_size())

#define DSC_SHARED(type, name, count)     \
    static const char name##_site = 0;    \
    type* const name = static_cast<type*>(ds_compress::emulator::shared_array(&name##_site, sizeof(type) * (count)))
#define DSC_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(ds_compress::emulator::dynamic_shared())

namespace ds_compress::emulator {

DSC_UNWATCHED inline uint3 thread_index() { return self->index; }
DSC_UNWATCHED inline uint3 block_index() { return block->index; }
DSC_UNWATCHED inline dim3 block_size() { return block->size; }
DSC_UNWATCHED inline dim3 grid_size() { return block->grid; }
DSC_UNWATCHED inline void* dynamic_shared() { return block->arena.dynamic(); }

DSC_UNWATCHED inline void* shared_array(const void* site, size_t bytes) {
    void* const array = block->arena.array(site, bytes);
    if (array == nullptr) fail("more shared memory than a block has");
    return array;
}

/// A kernel as nvcc's PTX says it, translated to C++ (ptx_to_cpp.py). A library built from such a translation
/// defines `dsc_ptx_kernel`, which finds one by its mangled name; then every launch runs that, not the source.
struct PtxKernel {
    void (*run)(void** parameters, size_t shared_bytes);
    size_t static_shared_bytes;
};
extern "C" const PtxKernel* dsc_ptx_kernel(const char* mangled) __attribute__((weak));

DSC_UNWATCHED inline const PtxKernel* find_ptx(const void* kernel) {
    if (dsc_ptx_kernel == nullptr) return nullptr;
    Dl_info symbol;
    if (dladdr(kernel, &symbol) == 0 || symbol.dli_sname == nullptr) fail("a kernel without a name");
    const PtxKernel* const found = dsc_ptx_kernel(symbol.dli_sname);
    if (found == nullptr) {
        std::fprintf(stderr, "emulator: no PTX for %s\n", symbol.dli_sname);
        std::abort();
    }
    return found;
}

template <class... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
    const PtxKernel* ptx;
    size_t shared_bytes;
    void* pointers[sizeof...(Parameters) + 1];

    static void run(void* self) {
        auto* const call = static_cast<Call*>(self);
        if (call->ptx != nullptr) call->ptx->run(call->pointers, call->shared_bytes);
        else std::apply(call->kernel, call->parameters);
    }
};

}  // namespace ds_compress::emulator

namespace ds_compress {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
    using namespace emulator;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
    if (grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidValue;
    Call<Parameters...> call{kernel, {static_cast<Parameters>(arguments)...},
                             find_ptx(reinterpret_cast<const void*>(kernel)), shared_bytes, {}};
    int i = 0;
    std::apply([&](auto&... each) { ((call.pointers[i++] = (void*)&each), ...); }, call.parameters);
    if (call.ptx != nullptr) call.shared_bytes += call.ptx->static_shared_bytes;
    if (call.shared_bytes > shared_memory_limit) return cudaErrorInvalidValue;
    run_grid(grid, block, call.shared_bytes, Call<Parameters...>::run, &call);
    return cudaSuccess;
}

/// Few, so that a small case already has more work than a grid has blocks.
inline int multiprocessors() { return 2; }

}  // namespace ds_compress
