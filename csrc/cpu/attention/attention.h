// Attention of short sequences on the CPU as plain functions, one for each instruction set.
//
// What torch has for this is made for long sequences (benchmarks/attention.py compares them). A kernel here is serial
// and computes all queries of some heads; who calls it cuts the work for threads, and no cut changes a bit. None checks
// its arguments. The formula is that of ds_compress/ops/reference/attention.py.
#pragma once

#include <cstdint>

#include "../linear/linear.h"

namespace ds_compress::cpu {

// Elements from one batch, head and token to the next. The numbers of a token lie side by side.
struct HeadStrides {
    int64_t batch, head, token;
};

struct AttentionCall {
    LinearType type;    // of query, key, value and y
    const void* query;  // (batch, heads, queries, width)
    const void* key;    // (batch, groups, keys, width): heads / groups heads read the same keys and values
    const void* value;  // (batch, groups, keys, value_width)
    HeadStrides query_strides, key_strides, value_strides;
    const float* bias;         // added to the scores, or null
    const bool* allowed;       // which scores count, or null
    HeadStrides mask_strides;  // of the one of them that there is: a token is a query
    int64_t heads, groups, queries, keys, width, value_width;
    float scale;
    bool is_causal;  // query i sees the keys up to i
    void* y;         // (batch, queries, heads, value_width), contiguous
};

struct AttentionKernel {
    // One batch and one group of heads.
    void (*run)(const AttentionCall& call, int64_t batch, int64_t group, void* scratch);
    // Of scratch, aligned to 64.
    int64_t (*scratch_bytes)(const AttentionCall& call);
};

// That for `isa()`.
const AttentionKernel& attention_kernel();

// Null where the compiler was not told to use these instructions.
const AttentionKernel* attention_scalar();
const AttentionKernel* attention_avx2();
const AttentionKernel* attention_avx512();

}  // namespace ds_compress::cpu
