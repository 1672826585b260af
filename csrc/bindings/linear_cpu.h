// What the bindings of integer linear layers share on the CPU: scratch memory, and the heads of packed weights.
#pragma once

#include <algorithm>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>

#include "../cpu/linear/linear.h"
#include "linear.h"

namespace ds_compress::bindings {

constexpr int64_t kSerialProducts = 200'000;  // less is done before another thread has woken up

// Memory of one thread that the next call uses again: fresh pages would cost more than a small product.
inline void* thread_scratch(int64_t bytes) {
    struct Memory {
        void* data = nullptr;
        int64_t bytes = 0;
        ~Memory() { std::free(data); }
    };
    static thread_local Memory memory;
    if (memory.bytes < bytes) {
        std::free(memory.data);
        memory.bytes = 0;
        memory.data = std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64)));
        if (memory.data == nullptr) throw std::bad_alloc();
        memory.bytes = bytes;
    }
    return memory.data;
}

// Asks for huge pages: a product that reads weights from memory waits for the addresses of small ones, too.
inline void advise_huge_pages([[maybe_unused]] uint8_t* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kHuge = 2 << 20;
    const auto address = reinterpret_cast<uintptr_t>(data);
    // With what lies around it in the first and the last page: two small weights have one together.
    const uintptr_t begin = address / kHuge * kHuge, end = (address + bytes + kHuge - 1) / kHuge * kHuge;
    if (bytes >= static_cast<int64_t>(kHuge / 4))
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may fail
#endif
}

inline cpu::LinearType type_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case kBf16:
            return cpu::LinearType::bf16;
        case kFp16:
            return cpu::LinearType::fp16;
        default:
            return cpu::LinearType::fp32;
    }
}

/// The call for kernels, which read the packed weight at `body`.
inline cpu::LinearCall plain_call(const LinearCall& call, const uint8_t* body) {
    const auto& [rows, columns, groups, group_size] = call.weight;
    return {call.x.const_data_ptr(),
            type_of(call.x),
            call.rows,
            {body, rows, columns, groups, group_size},
            call.weight_scale,
            call.bias,
            call.input_scale,
            call.steps,
            static_cast<cpu::Activation>(call.activation),
            call.y.mutable_data_ptr(),
            type_of(call.y)};
}

inline int64_t panels_of(const cpu::LinearKernels& kernels, int64_t rows) {
    return (rows + kernels.panel_columns - 1) / kernels.panel_columns;
}

constexpr int64_t kRowsWorthATask = 16;  // so many rows use a panel of weights well

/// Cuts the result among the threads: by rows where there are many, so that each row is quantized once, else by panels.
template <class Work>
void for_rectangles(const cpu::LinearCall& call, int64_t panels, const Work& work) {
    using cpu::Range;
    if (call.rows == 0 || panels == 0) return;
    const bool serial = call.rows * call.weight.rows * call.weight.columns < kSerialProducts;
    const int64_t threads = serial ? 1 : torch::stable::get_num_threads();
    if (threads == 1) return work(Range{0, call.rows}, Range{0, panels});
    int64_t row_parts = threads;
    while (row_parts > 1 && (threads % row_parts != 0 || call.rows / row_parts < kRowsWorthATask)) row_parts--;
    const int64_t panel_parts = std::min(panels, threads / row_parts);
    torch::stable::parallel_for(0, row_parts * panel_parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; task++) {
            const int64_t row = task / panel_parts, panel = task % panel_parts;
            // Whole tiles of 8 rows, but for the last part.
            const auto row_of = [&](int64_t part) {
                return part == row_parts ? call.rows : call.rows * part / row_parts / 8 * 8;
            };
            work(Range{row_of(row), row_of(row + 1)},
                 Range{panels * panel / panel_parts, panels * (panel + 1) / panel_parts});
        }
    });
}

/// The head of the packed weight of `size` bytes at `bytes`, checked.
inline PackedHeader header_at(const uint8_t* bytes, int64_t size, int64_t layout) {
    PackedHeader header;
    std::memcpy(&header, bytes, sizeof header);
    require(header.magic == kPackedMagic, "this is no packed weight: pack it with int8_linear_pack or its relatives");
    require(header.layout == layout, "this weight was packed for other kernels (layout ", header.layout, "); ",
            cpu::name_of(cpu::linear_kernels().isa), " reads layout ", layout, ": pack it again");
    const int64_t expected = packed_bytes(header.rows, header.columns, header.groups > 0 ? 4 : 8, header.groups);
    require(size == expected, "a packed weight of (", header.rows, ", ", header.columns, ") has ", expected,
            " bytes, got ", size);
    return header;
}

inline bool holds_header(const Tensor& packed, int64_t size) {
    return packed.scalar_type() == kByte && packed.is_contiguous() &&
           size >= static_cast<int64_t>(sizeof(PackedHeader));
}

}  // namespace ds_compress::bindings
