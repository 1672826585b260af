// Linear layers whose weights alone are quantized, on CPU tensors.
#include "../cpu/weight_only/weight_only.h"

#include <algorithm>

#include "linear_cpu.h"

namespace ds_compress::bindings {
namespace {

using cpu::Range;
using cpu::Storage;
using cpu::WeightOnlyWeight;

constexpr const char* kStorages[] = {"int2", "int4", "int8", "e2m1"};

Storage storage_of(const std::string& name) {
    for (int i = 0; i < 4; i++)
        if (name == kStorages[i]) return static_cast<Storage>(i);
    throw std::invalid_argument("storage is one of int2, int4, int8, e2m1, got '" + name + "'");
}

int excess_of(Storage storage, bool has_offset) {
    constexpr int kExcess[] = {2, 8, 128, 12};
    return has_offset ? 0 : kExcess[static_cast<int>(storage)];
}

WeightOnlyWeight weight_of(const PackedHeader& header) {
    const auto storage = static_cast<Storage>(header.spare[1]);
    const bool has_offset = header.spare[2] != 0;
    return {
        nullptr,   header.rows, header.columns, header.groups, header.spare[0], storage, excess_of(storage, has_offset),
        has_offset};
}

int64_t bytes_of(const WeightOnlyWeight& weight) {
    return static_cast<int64_t>(sizeof(PackedHeader)) + weight.panels() * weight.panel_bytes();
}

template <class T>
void require_within(const Tensor& values, int lowest, int highest) {
    const auto* begin = const_data<T>(values);
    require(std::all_of(begin, begin + values.numel(), [=](T v) { return v >= lowest && v <= highest; }),
            "values lie in [", lowest, ", ", highest, "]");
}

// The values as the storage holds them: signed, or unsigned where they are codes or have offsets.
void require_values(const Tensor& values, Storage storage, bool has_offset) {
    const int bits = storage == Storage::int2 ? 2 : storage == Storage::int8 ? 8 : 4;
    const bool is_unsigned = has_offset || storage == Storage::e2m1;
    require(values.dim() == 2 && values.scalar_type() == (is_unsigned ? kByte : ScalarType::Char), "values are ",
            is_unsigned ? "uint8" : "int8", " (out_features, in_features), got ", described(values));
    if (is_unsigned)
        require_within<uint8_t>(values, 0, (1 << bits) - 1);
    else
        require_within<int8_t>(values, -(1 << (bits - 1)), (1 << (bits - 1)) - 1);
}

void require_scales(const char* name, const Tensor& scale, int64_t rows, int64_t groups) {
    require(scale.scalar_type() == kFp32 && scale.dim() == 2 && scale.size(0) == rows && scale.size(1) == groups, name,
            " is float32 (", rows, ", ", groups, "), got ", described(scale));
}

/// cut(panels) for parts of the panels, on as many threads as the work deserves.
template <class F>
void for_panels(int64_t panels, int64_t products, const F& cut) {
    const int64_t threads = products < kSerialProducts ? 1 : torch::stable::get_num_threads();
    if (threads == 1) return cut(Range{0, panels});
    const int64_t parts = std::min(panels, threads);
    torch::stable::parallel_for(
        0, parts, 1, [&](int64_t begin, int64_t end) { cut(Range{panels * begin / parts, panels * end / parts}); });
}

Tensor weight_only_linear_pack(const Tensor& given, const Tensor& scale, std::optional<Tensor> offset,
                               int64_t group_size, std::string storage_name) {
    const Storage storage = storage_of(storage_name);
    require(!offset || storage != Storage::e2m1, "e2m1 has no offsets");
    const Tensor values = as_contiguous(given);
    require_values(values, storage, offset.has_value());
    require(group_size >= 1, "group_size is at least 1, got ", group_size);
    const int64_t rows = values.size(0), columns = values.size(1), groups = (columns + group_size - 1) / group_size;
    require_scales("scale", scale, rows, groups);
    if (offset) require_scales("offset", *offset, rows, groups);
    const PackedHeader header{kPackedMagic, kLayoutWeightOnly,
                              rows,         columns,
                              groups,       {group_size, static_cast<int64_t>(storage), offset.has_value()}};
    const WeightOnlyWeight weight = weight_of(header);
    const Tensor packed = new_tensor(values, {bytes_of(weight)}, kByte);
    auto* to = data<uint8_t>(packed);
    advise_huge_pages(to, bytes_of(weight));
    std::memcpy(to, &header, sizeof header);
    const Tensor scales = as_contiguous(scale);
    const std::optional<Tensor> offsets = offset ? std::optional<Tensor>(as_contiguous(*offset)) : std::nullopt;
    for_panels(weight.panels(), rows * columns, [&](Range panels) {
        cpu::weight_only_pack(static_cast<const uint8_t*>(values.const_data_ptr()), const_data<float>(scales),
                              const_data_or_null<float>(offsets), weight, panels, to + sizeof header);
    });
    return packed;
}

WeightOnlyWeight packed_weight(const Tensor& packed, int64_t out_features) {
    require(packed.dim() == 1 && holds_header(packed, packed.size(0)),
            "a packed weight is contiguous uint8 (bytes,), got ", described(packed));
    PackedHeader header;
    const auto* bytes = const_data<uint8_t>(packed);
    std::memcpy(&header, bytes, sizeof header);
    require(header.magic == kPackedMagic, "this is no packed weight: pack it with weight_only_linear_pack");
    require(header.layout == kLayoutWeightOnly, "this weight was packed for other kernels (layout ", header.layout,
            "); weight_only_linear reads layout ", static_cast<int64_t>(kLayoutWeightOnly), ": pack it again");
    WeightOnlyWeight weight = weight_of(header);
    require(packed.size(0) == bytes_of(weight), "a packed weight of (", weight.rows, ", ", weight.columns, ") has ",
            bytes_of(weight), " bytes, got ", packed.size(0));
    require(out_features == weight.rows, "this weight has ", weight.rows, " out_features, got ", out_features);
    weight.body = bytes + sizeof header;
    return weight;
}

const cpu::WeightOnlyAmx* weight_only_amx_here() {
#if defined(__x86_64__)
    return cpu::has_amx_bf16() ? cpu::weight_only_amx() : nullptr;
#else
    return nullptr;
#endif
}

Tensor weight_only_linear(const Tensor& given, const Tensor& packed, int64_t out_features, std::optional<Tensor> bias,
                          std::string activation, std::optional<ScalarType> out_dtype) {
    const WeightOnlyWeight weight = packed_weight(packed, out_features);
    require_layer(given, weight.columns, weight.rows, bias, out_dtype);
    const auto activation_number = static_cast<cpu::Activation>(activation_of(activation));
    const Rows rows(given, weight.rows, out_dtype);
    if (rows.count == 0 || weight.rows == 0) return rows.y;
    const cpu::WeightOnlyCall call{
        rows.x.const_data_ptr(), type_of(rows.x),           rows.count,     weight, const_data_or_null<float>(bias),
        activation_number,       rows.y.mutable_data_ptr(), type_of(rows.y)};
    const auto run = [&](const auto& kernels) {
        const int64_t scratch = kernels.scratch_bytes(weight, rows.count);
        for_panels(weight.panels(), rows.count * weight.rows * weight.columns,
                   [&](Range panels) { kernels.linear(call, Range{0, rows.count}, panels, thread_scratch(scratch)); });
    };
    const cpu::WeightOnlyAmx* amx = weight_only_amx_here();
    if (amx != nullptr && amx->takes(call))
        run(*amx);
    else
        run(cpu::weight_only_kernels());
    return rows.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CPU, m) {
    m.impl("weight_only_linear_pack", TORCH_BOX(&weight_only_linear_pack));
    m.impl("weight_only_linear", TORCH_BOX(&weight_only_linear));
}

}  // namespace ds_compress::bindings
