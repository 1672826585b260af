// Attention of short sequences, on CPU tensors.
#include "../cpu/attention/attention.h"

#include "linear_cpu.h"

namespace ds_compress::bindings {
namespace {

using cpu::HeadStrides;

void require_heads(const char* name, const Tensor& tensor, const Tensor& query) {
    require(tensor.dim() == 4 && tensor.scalar_type() == query.scalar_type() && tensor.size(0) == query.size(0), name,
            " is (batch, heads, tokens, width) in the dtype and with the batch of query, got ", described(tensor));
}

// The numbers of a token side by side.
Tensor with_whole_tokens(const Tensor& tensor) {
    return tensor.size(3) == 1 || tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

HeadStrides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

// Where a dimension has one entry for all, its stride is 0.
HeadStrides mask_strides_of(const Tensor& mask) {
    const auto stride = [&](int i) { return mask.size(i) == 1 ? 0 : mask.stride(i); };
    return {stride(0), stride(1), stride(2)};
}

void require_mask(const Tensor& mask, const Tensor& query, int64_t keys) {
    const bool fits = mask.dim() == 4 && mask.size(3) == keys && (mask.size(0) == 1 || mask.size(0) == query.size(0)) &&
                      (mask.size(1) == 1 || mask.size(1) == query.size(1)) &&
                      (mask.size(2) == 1 || mask.size(2) == query.size(2));
    require(fits && (mask.scalar_type() == kFp32 || mask.scalar_type() == ScalarType::Bool),
            "mask is bool or float32 (batch or 1, heads or 1, queries or 1, ", keys, "), got ", described(mask));
}

Tensor attention(const Tensor& given_query, const Tensor& given_key, const Tensor& given_value,
                 std::optional<Tensor> given_mask, double scale, bool is_causal) {
    const ScalarType type = given_query.scalar_type();
    require(given_query.dim() == 4 && (type == kFp32 || type == kBf16 || type == kFp16),
            "query is (batch, heads, tokens, width) in fp32, bf16 or fp16, got ", described(given_query));
    require_heads("key", given_key, given_query);
    require_heads("value", given_value, given_query);
    const int64_t batch = given_query.size(0), heads = given_query.size(1), queries = given_query.size(2),
                  groups = given_key.size(1), keys = given_key.size(2), value_width = given_value.size(3);
    require(given_key.size(3) == given_query.size(3), "key is as wide as query, ", given_query.size(3), ", got ",
            described(given_key));
    require(given_value.size(1) == groups && given_value.size(2) == keys, "value has the heads and tokens of key, ",
            groups, " and ", keys, ", got ", described(given_value));
    require(groups > 0 && heads % groups == 0, "heads of query are a multiple of those of key, got ", heads, " and ",
            groups);
    if (given_mask) require_mask(*given_mask, given_query, keys);

    const Tensor query = with_whole_tokens(given_query), key = with_whole_tokens(given_key),
                 value = with_whole_tokens(given_value);
    const std::optional<Tensor> mask =
        given_mask ? std::optional<Tensor>(with_whole_tokens(*given_mask)) : std::nullopt;
    const bool is_bool = mask && mask->scalar_type() == ScalarType::Bool;
    const Tensor y = new_tensor(query, {batch, queries, heads, value_width}, type);
    const cpu::AttentionCall call{
        .type = type_of(query),
        .query = query.const_data_ptr(),
        .key = key.const_data_ptr(),
        .value = value.const_data_ptr(),
        .query_strides = strides_of(query),
        .key_strides = strides_of(key),
        .value_strides = strides_of(value),
        .bias = mask && !is_bool ? const_data<float>(*mask) : nullptr,
        .allowed = is_bool ? const_data<bool>(*mask) : nullptr,
        .mask_strides = mask ? mask_strides_of(*mask) : HeadStrides{},
        .heads = heads,
        .groups = groups,
        .queries = queries,
        .keys = keys,
        .width = query.size(3),
        .value_width = value_width,
        .scale = static_cast<float>(scale),
        .is_causal = is_causal,
        .y = y.mutable_data_ptr(),
    };
    if (batch == 0 || queries == 0 || value_width == 0) return y;
    const cpu::AttentionKernel& kernel = cpu::attention_kernel();
    const int64_t scratch = kernel.scratch_bytes(call), tasks = batch * groups;
    const auto run = [&](int64_t begin, int64_t end) {
        void* memory = thread_scratch(scratch);
        for (int64_t task = begin; task < end; task++) kernel.run(call, task / groups, task % groups, memory);
    };
    const bool serial = batch * heads * queries * keys * (call.width + value_width) < kSerialProducts;
    if (serial || torch::stable::get_num_threads() == 1)
        run(0, tasks);
    else
        torch::stable::parallel_for(0, tasks, 1, run);
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }

}  // namespace ds_compress::bindings
