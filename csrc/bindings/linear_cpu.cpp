// The integer linear layers on CPU tensors: packing, and the cutting of the work for threads.
#include "linear_cpu.h"

#include <algorithm>

namespace ds_compress::bindings {
namespace {

using cpu::LinearKernels;
using cpu::LinearWeight;
using cpu::Range;

uint8_t* body_of(const Tensor& packed) { return data<uint8_t>(packed) + sizeof(PackedHeader); }

LinearWeight shape_of_weight(const Tensor& weight, int64_t groups = 0) {
    return {nullptr, weight.size(0), weight.size(1), groups, 0};
}

// --- packing -------------------------------------------------------------------------------------------------------

// With its header, and zeros behind the panels: equal weights have equal bytes.
Tensor new_packed(const Tensor& like, int64_t layout, const LinearWeight& weight, int64_t body_bytes) {
    const int64_t bytes = packed_bytes(weight.rows, weight.columns, weight.groups > 0 ? 4 : 8, weight.groups);
    Tensor packed = new_tensor(like, {bytes}, kByte);
    const PackedHeader header{kPackedMagic, layout, weight.rows, weight.columns, weight.groups, {}};
    auto* to = data<uint8_t>(packed);
    advise_huge_pages(to, bytes);
    std::memcpy(to, &header, sizeof header);
    const int64_t used = static_cast<int64_t>(sizeof header) + body_bytes;
    std::memset(to + used, 0, static_cast<size_t>(bytes - used));
    return packed;
}

Tensor new_int8_packed(const Tensor& like, const LinearKernels& kernels, const LinearWeight& weight) {
    return new_packed(like, kernels.int8_layout, weight,
                      panels_of(kernels, weight.rows) * kernels.int8_panel_bytes(weight));
}

// pack(panels, scratch) for all panels, on as many threads as the size deserves.
template <class F>
void for_panels(const LinearKernels& kernels, const LinearWeight& weight, const F& pack) {
    const int64_t panels = panels_of(kernels, weight.rows);
    const int64_t elements = std::max<int64_t>(1, weight.columns * kernels.panel_columns);
    const int64_t bytes = kernels.scratch_bytes(weight.columns, weight.groups);
    torch::stable::parallel_for(0, panels, std::max<int64_t>(1, 65536 / elements),
                                [&](int64_t begin, int64_t end) { pack(Range{begin, end}, thread_scratch(bytes)); });
}

// --- multiplying ---------------------------------------------------------------------------------------------------

template <class Kernel>
void run(const LinearKernels& kernels, const cpu::LinearCall& call, Kernel kernel) {
    const int64_t bytes = kernels.scratch_bytes(call.weight.columns, call.weight.groups);
    for_rectangles(call, panels_of(kernels, call.weight.rows),
                   [&](Range rows, Range panels) { kernel(call, rows, panels, thread_scratch(bytes)); });
}

PackedHeader header_of(const Tensor& packed, int64_t layout) {
    require(packed.dim() == 1 && holds_header(packed, packed.size(0)),
            "a packed weight is contiguous uint8 (bytes,), got ", described(packed));
    return header_at(const_data<uint8_t>(packed), packed.size(0), layout);
}

void multiply(const LinearCall& call, void (*LinearKernels::*kernel)(const cpu::LinearCall&, Range, Range, void*)) {
    const LinearKernels& kernels = cpu::linear_kernels();
    run(kernels, plain_call(call, body_of(call.packed)), kernels.*kernel);
}

struct Cpu {
    static Tensor int8_pack(const Tensor& quantized) {
        const LinearKernels& kernels = cpu::linear_kernels();
        const LinearWeight weight = shape_of_weight(quantized);
        const Tensor packed = new_int8_packed(quantized, kernels, weight);
        for_panels(kernels, weight, [&](Range panels, void* scratch) {
            kernels.int8_pack(const_data<int8_t>(quantized), weight, panels, scratch, body_of(packed));
        });
        return packed;
    }

    static Tensor int8_quantize_pack(const Tensor& values, const Tensor& scale, int steps) {
        const LinearKernels& kernels = cpu::linear_kernels();
        const LinearWeight weight = shape_of_weight(values);
        const Tensor packed = new_int8_packed(values, kernels, weight);
        const bool per_row = scale.size(0) == weight.rows;
        for_panels(kernels, weight, [&](Range panels, void* scratch) {
            kernels.int8_quantize_pack(values.const_data_ptr(), type_of(values), const_data<float>(scale), per_row,
                                       steps, weight, panels, scratch, body_of(packed));
        });
        return packed;
    }

    static Tensor int4_pack(const Tensor& quantized, const Tensor& scale) {
        const auto* from = const_data<int8_t>(quantized);
        require(std::all_of(from, from + quantized.numel(), [](int8_t q) { return q >= -8 && q <= 7; }),
                "int4 values lie in [-8, 7]");
        const LinearKernels& kernels = cpu::linear_kernels();
        const LinearWeight weight = shape_of_weight(quantized, scale.size(1));
        const int64_t body_bytes = panels_of(kernels, weight.rows) * kernels.int4_panel_bytes(weight);
        const Tensor packed = new_packed(quantized, kernels.int4_layout, weight, body_bytes);
        for_panels(kernels, weight, [&](Range panels, void*) {
            kernels.int4_pack(from, const_data<float>(scale), weight, panels, body_of(packed));
        });
        return packed;
    }

    static WeightShape int8_weight(const Tensor&, const Tensor& packed, const Tensor&) {
        const PackedHeader header = header_of(packed, cpu::linear_kernels().int8_layout);
        return {header.rows, header.columns};
    }

    static WeightShape int4_weight(const Tensor&, const Tensor& packed, int64_t out_features, int64_t group_size) {
        const PackedHeader header = header_of(packed, cpu::linear_kernels().int4_layout);
        require(out_features == header.rows, "this weight has ", header.rows, " out_features, got ", out_features);
        const WeightShape weight{header.rows, header.columns, header.groups, group_size};
        require_groups(group_size, weight);
        return weight;
    }

    static void int8_linear(const LinearCall& call) { multiply(call, &LinearKernels::int8_linear); }
    static void int4_linear(const LinearCall& call) { multiply(call, &LinearKernels::int4_linear); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CPU, m) { Linear<Cpu>::register_in(m); }

}  // namespace ds_compress::bindings
