// The linear ops on CPU tensors: checks, results, and the cutting of the work for threads.
#include <torch/csrc/stable/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "../cpu/linear/linear.h"
#include "linear_checks.h"

namespace ds_compress {
namespace {

using cpu::Activation;
using cpu::LinearCall;
using cpu::LinearKernels;
using cpu::LinearType;
using cpu::LinearWeight;
using cpu::Range;

// Memory of one thread that the next call uses again: fresh pages would cost more than a small product.
void* thread_scratch(int64_t bytes) {
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

LinearType type_of(ScalarType type) {
    switch (type) {
        case ScalarType::BFloat16:
            return LinearType::bf16;
        case ScalarType::Half:
            return LinearType::fp16;
        default:
            return LinearType::fp32;
    }
}

Activation activation_of(const std::string& name) {
    if (name == "none") return Activation::none;
    if (name == "relu") return Activation::relu;
    if (name == "gelu_erf") return Activation::gelu_erf;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    if (name == "silu") return Activation::silu;
    throw std::invalid_argument("activation is one of none, relu, gelu_erf, gelu_tanh, silu, got '" + name + "'");
}

int64_t panels_of(const LinearKernels& kernels, int64_t rows) {
    return (rows + kernels.panel_columns - 1) / kernels.panel_columns;
}

// --- packing ------------------------------------------------------------------------------------------------------

// Asks for huge pages: a product that reads weights from memory waits for the addresses of small ones, too.
void advise_huge_pages([[maybe_unused]] uint8_t* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kHuge = 2 << 20;
    const auto address = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge, end = (address + bytes) / kHuge * kHuge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may fail: it is a wish
#endif
}

// With its header, and zeros behind the panels: equal weights have equal bytes.
Tensor new_packed(const Tensor& like, int64_t layout, const LinearWeight& weight, int64_t body_bytes) {
    const int64_t bytes = packed_bytes(weight.rows, weight.columns, weight.groups > 0 ? 4 : 8, weight.groups);
    Tensor packed = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
    const PackedHeader header{kPackedMagic, layout, weight.rows, weight.columns, weight.groups, {}};
    auto* data = static_cast<uint8_t*>(packed.mutable_data_ptr());
    advise_huge_pages(data, bytes);
    std::memcpy(data, &header, sizeof header);
    const int64_t used = static_cast<int64_t>(sizeof header) + body_bytes;
    std::memset(data + used, 0, static_cast<size_t>(bytes - used));
    return packed;
}

Tensor new_int8_packed(const Tensor& like, const LinearKernels& kernels, const LinearWeight& weight) {
    return new_packed(like, kernels.int8_layout, weight,
                      panels_of(kernels, weight.rows) * kernels.int8_panel_bytes(weight));
}

uint8_t* body_of(const Tensor& packed) {
    return static_cast<uint8_t*>(packed.mutable_data_ptr()) + sizeof(PackedHeader);
}

// pack(panels, scratch) for all panels, on as many threads as the size deserves.
template <class F>
void for_panels(const LinearKernels& kernels, const LinearWeight& weight, const F& pack) {
    const int64_t panels = panels_of(kernels, weight.rows);
    const int64_t elements = std::max<int64_t>(1, weight.columns * kernels.panel_columns);
    const int64_t bytes = kernels.scratch_bytes(weight.columns, weight.groups);
    torch::stable::parallel_for(0, panels, std::max<int64_t>(1, 65536 / elements), [&](int64_t begin, int64_t end) {
        pack(Range{begin, end}, thread_scratch(bytes));
    });
}

Tensor int8_linear_pack(const Tensor& given) {
    require_codes(given);
    const Tensor codes = torch::stable::contiguous(given);
    const LinearKernels& kernels = cpu::linear_kernels();
    const LinearWeight weight{nullptr, codes.size(0), codes.size(1), 0, 0};
    const Tensor packed = new_int8_packed(codes, kernels, weight);
    const auto* from = static_cast<const int8_t*>(codes.const_data_ptr());
    for_panels(kernels, weight, [&](Range panels, void* scratch) {
        kernels.int8_pack(from, weight, panels, scratch, body_of(packed));
    });
    return packed;
}

Tensor int8_linear_quantize_pack(const Tensor& given, const Tensor& scale, int64_t steps) {
    require(given.dim() == 2, "weight is (out_features, in_features), got ", shape_of(given));
    require_float(given.scalar_type(), "weight");
    require(is_vector(scale, given.size(0)) || is_vector(scale, 1), "scale is Float (", given.size(0),
            ") or (1), got ", shape_of(scale));
    require_steps(steps);
    const Tensor values = torch::stable::contiguous(given);
    const LinearKernels& kernels = cpu::linear_kernels();
    const LinearWeight weight{nullptr, values.size(0), values.size(1), 0, 0};
    const Tensor packed = new_int8_packed(values, kernels, weight);
    const auto* scales = static_cast<const float*>(scale.const_data_ptr());
    const bool per_row = scale.size(0) == weight.rows;
    for_panels(kernels, weight, [&](Range panels, void* scratch) {
        kernels.int8_quantize_pack(values.const_data_ptr(), type_of(values.scalar_type()), scales, per_row,
                                   static_cast<int>(steps), weight, panels, scratch, body_of(packed));
    });
    return packed;
}

Tensor int4_linear_pack(const Tensor& given, const Tensor& given_scale) {
    require_codes(given);
    require(given_scale.scalar_type() == ScalarType::Float && given_scale.dim() == 2 &&
                given_scale.size(0) == given.size(0),
            "scale is Float (", given.size(0), ", groups), got ", shape_of(given_scale));
    const Tensor codes = torch::stable::contiguous(given), scale = torch::stable::contiguous(given_scale);
    const auto* from = static_cast<const int8_t*>(codes.const_data_ptr());
    require(std::all_of(from, from + codes.numel(), [](int8_t code) { return code >= -8 && code <= 7; }),
            "int4 codes lie in [-8, 7]");
    const LinearKernels& kernels = cpu::linear_kernels();
    const LinearWeight weight{nullptr, codes.size(0), codes.size(1), scale.size(1), 0};
    const int64_t body_bytes = panels_of(kernels, weight.rows) * kernels.int4_panel_bytes(weight);
    const Tensor packed = new_packed(codes, kernels.int4_layout, weight, body_bytes);
    const auto* scales = static_cast<const float*>(scale.const_data_ptr());
    for_panels(kernels, weight, [&](Range panels, void*) {
        kernels.int4_pack(from, scales, weight, panels, body_of(packed));
    });
    return packed;
}

Tensor sparse24_linear_pack(const Tensor& given) {
    require_codes(given);
    require(given.size(1) % 4 == 0, "2:4 weights have a multiple of 4 columns, got ", given.size(1));
    const Tensor codes = torch::stable::contiguous(given);
    const auto* from = static_cast<const int8_t*>(codes.const_data_ptr());
    for (int64_t i = 0; i < codes.numel(); i += 4) {
        const int count = (from[i] != 0) + (from[i + 1] != 0) + (from[i + 2] != 0) + (from[i + 3] != 0);
        require(count <= 2, "2:4 weights have at most 2 non-zeros in 4 columns: row ", i / codes.size(1), ", columns ",
                i % codes.size(1), " to ", i % codes.size(1) + 3);
    }
    return int8_linear_pack(codes);
}

// --- multiplying --------------------------------------------------------------------------------------------------

constexpr int64_t kSerialProducts = 200'000;  // less is done before another thread has woken up
constexpr int64_t kRowsWorthATask = 16;       // so many rows use a panel of weights well

// Cuts the result among the threads: by rows where there are many, so that each row is quantized once, else by panels.
template <class Kernel>
void run(const LinearKernels& kernels, const LinearCall& call, Kernel kernel) {
    const int64_t panels = panels_of(kernels, call.weight.rows);
    if (call.rows == 0 || panels == 0) return;
    const int64_t bytes = kernels.scratch_bytes(call.weight.columns, call.weight.groups);
    const bool serial = call.rows * call.weight.rows * call.weight.columns < kSerialProducts;
    const int64_t threads = serial ? 1 : torch::stable::get_num_threads();
    if (threads == 1) return kernel(call, Range{0, call.rows}, Range{0, panels}, thread_scratch(bytes));
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
            const Range rows{row_of(row), row_of(row + 1)};
            const Range columns{panels * panel / panel_parts, panels * (panel + 1) / panel_parts};
            kernel(call, rows, columns, thread_scratch(bytes));
        }
    });
}

PackedHeader header_of(const Tensor& packed, int64_t layout, const LinearKernels& kernels) {
    require(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous() &&
                packed.size(0) >= static_cast<int64_t>(sizeof(PackedHeader)),
            "a packed weight is contiguous Byte (bytes), got ", shape_of(packed));
    PackedHeader header;
    std::memcpy(&header, packed.const_data_ptr(), sizeof header);
    require_packed(header, packed.size(0), layout, cpu::name_of(kernels.isa));
    return header;
}

LinearCall call_of(const Tensor& x, const LinearWeight& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& input_scale, int64_t steps, const std::string& activation,
                   const Tensor& y) {
    const auto pointer = [](const std::optional<Tensor>& tensor) {
        return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
    };
    int64_t rows = 1;
    for (int64_t i = 0; i + 1 < x.dim(); i++) rows *= x.size(i);
    return {x.const_data_ptr(),  type_of(x.scalar_type()),  rows,
            weight,              nullptr,                   pointer(bias),
            pointer(input_scale), static_cast<int>(steps),  activation_of(activation),
            y.mutable_data_ptr(), type_of(y.scalar_type())};
}

Tensor int8_linear(const Tensor& given, const Tensor& packed, const Tensor& weight_scale, std::optional<Tensor> bias,
                   std::optional<Tensor> input_scale, int64_t steps, std::string activation,
                   std::optional<ScalarType> out_dtype) {
    const LinearKernels& kernels = cpu::linear_kernels();
    const PackedHeader header = header_of(packed, kernels.int8_layout, kernels);
    require(is_vector(weight_scale, header.rows), "weight_scale is contiguous Float (", header.rows, "), got ",
            shape_of(weight_scale));
    require_linear(given, header.rows, header.columns, bias, input_scale, steps, out_dtype);
    const Tensor x = given.is_contiguous() ? given : torch::stable::contiguous(given);
    const Tensor y = torch::stable::new_empty(x, result_shape(x, header.rows), out_dtype.value_or(x.scalar_type()));
    const LinearWeight weight{body_of(packed), header.rows, header.columns, 0, 0};
    LinearCall call = call_of(x, weight, bias, input_scale, steps, activation, y);
    call.weight_scale = static_cast<const float*>(weight_scale.const_data_ptr());
    run(kernels, call, kernels.int8_linear);
    return y;
}

Tensor int4_linear(const Tensor& given, const Tensor& packed, int64_t out_features, int64_t group_size,
                   std::optional<Tensor> bias, std::optional<Tensor> input_scale, int64_t steps,
                   std::string activation, std::optional<ScalarType> out_dtype) {
    const LinearKernels& kernels = cpu::linear_kernels();
    const PackedHeader header = header_of(packed, kernels.int4_layout, kernels);
    require(out_features == header.rows, "this weight has ", header.rows, " out_features, got ", out_features);
    require(group_size >= 32 && group_size % 32 == 0 &&
                (header.columns + group_size - 1) / group_size == header.groups,
            "group_size is a multiple of 32 that makes ", header.groups, " groups of ", header.columns,
            " columns, got ", group_size);
    require_linear(given, header.rows, header.columns, bias, input_scale, steps, out_dtype);
    const Tensor x = given.is_contiguous() ? given : torch::stable::contiguous(given);
    const Tensor y = torch::stable::new_empty(x, result_shape(x, header.rows), out_dtype.value_or(x.scalar_type()));
    const LinearWeight weight{body_of(packed), header.rows, header.columns, header.groups, group_size};
    run(kernels, call_of(x, weight, bias, input_scale, steps, activation, y), kernels.int4_linear);
    return y;
}

}  // namespace
}  // namespace ds_compress

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CPU, m) {
    m.impl("int8_linear_pack", TORCH_BOX(&ds_compress::int8_linear_pack));
    m.impl("int8_linear_quantize_pack", TORCH_BOX(&ds_compress::int8_linear_quantize_pack));
    m.impl("int8_linear", TORCH_BOX(&ds_compress::int8_linear));
    m.impl("int4_linear_pack", TORCH_BOX(&ds_compress::int4_linear_pack));
    m.impl("int4_linear", TORCH_BOX(&ds_compress::int4_linear));
    m.impl("sparse24_linear_pack", TORCH_BOX(&ds_compress::sparse24_linear_pack));
    // A dense product does not gain from zeros on a CPU; the op is here so that a model runs on both devices.
    m.impl("sparse24_linear", TORCH_BOX(&ds_compress::int8_linear));
}
