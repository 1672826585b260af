// The block-sparse int8 linear layer on CPU tensors. Packing is plain torch's: the form is the same for all.
#include "../cpu/linear/block_sparse.h"

#include <algorithm>

#include "linear_cpu.h"

namespace ds_compress::bindings {
namespace {

using cpu::BlockSparseKernels;
using cpu::BlockSparseLayout;
using cpu::BlockSparseWeight;
using cpu::Range;

/// A packed weight whose blocks all lie within it: what a kernel may follow without looking.
struct Packed {
    WeightShape shape;
    BlockSparseWeight weight;

    explicit Packed(const Tensor& packed) {
        require(packed.dim() == 1 && holds_header(packed, packed.size(0)),
                "a packed weight is contiguous uint8 (bytes,), got ", described(packed));
        const auto* bytes = const_data<uint8_t>(packed);
        PackedHeader header;
        std::memcpy(&header, bytes, sizeof header);
        require(header.magic == kPackedMagic && header.layout == kLayoutBlockSparse,
                "this is no packed block-sparse weight: pack it with block_sparse_int8_linear_pack");
        const int64_t blocks = header.groups;
        require(header.rows >= 0 && header.columns >= 0 && blocks >= 0 && header.rows <= INT32_MAX &&
                    header.columns <= INT32_MAX && blocks <= INT32_MAX,
                "the head of this packed weight is damaged: pack it again");
        const BlockSparseLayout layout(header.rows, header.columns, blocks);
        const int64_t expected = static_cast<int64_t>(sizeof header) + layout.bytes;
        require(packed.size(0) == expected, "a packed weight of (", header.rows, ", ", header.columns, ") with ",
                blocks, " blocks has ", expected, " bytes, got ", packed.size(0));
        shape = {header.rows, header.columns};
        bytes += sizeof header;
        weight = {reinterpret_cast<const int32_t*>(bytes), reinterpret_cast<const int32_t*>(bytes + layout.ends),
                  reinterpret_cast<const uint16_t*>(bytes + layout.inputs),
                  reinterpret_cast<const int8_t*>(bytes + layout.values)};
        const int64_t groups = round_up(header.rows, cpu::kStripOutputs) / cpu::kBlockOutputs;
        check_blocks(groups * cpu::chunks_of(header.columns), blocks);
    }

private:
    // Takes about a hundredth of the smallest product.
    void check_blocks(int64_t ends, int64_t blocks) const {
        int32_t last = 0, ordered = 1;
        for (int64_t i = 0; i < ends; i++) {
            ordered &= weight.ends[i] >= last;
            last = weight.ends[i];
        }
        uint16_t furthest = 0;
        for (int64_t i = 0; i < blocks; i++) furthest = std::max(furthest, weight.inputs[i]);
        require(ordered && last == blocks && (blocks == 0 || furthest * cpu::kBlockInputs < shape.columns),
                "the index of this packed weight is damaged: pack it again");
    }
};

void multiply(const LinearCall& call, const BlockSparseWeight& weight) {
    const BlockSparseKernels& kernels = cpu::block_sparse_kernels();
    const cpu::LinearCall plain = plain_call(call, nullptr);
    const int64_t strips = round_up(call.weight.rows, cpu::kStripOutputs) / cpu::kStripOutputs;
    const int64_t bytes = kernels.scratch_bytes(call.weight.columns);
    for_rectangles(plain, strips,
                   [&](Range rows, Range part) { kernels.linear(plain, weight, rows, part, thread_scratch(bytes)); });
}

struct NoDevice {};

struct BlockSparse : private Linear<NoDevice> {
    static Tensor block_sparse_int8_linear(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                                           std::optional<Tensor> bias, std::optional<Tensor> input_scale, int64_t steps,
                                           std::string activation, std::optional<ScalarType> out_dtype) {
        const Packed checked(packed);
        require(is_vector(weight_scale, checked.shape.rows), "weight_scale is contiguous float32 (", checked.shape.rows,
                ",), got ", described(weight_scale));
        return run(x, packed, checked.shape, &weight_scale, bias, input_scale, steps, activation, out_dtype,
                   [&](const LinearCall& call) { multiply(call, checked.weight); });
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CPU, m) {
    m.impl("block_sparse_int8_linear", TORCH_BOX(&BlockSparse::block_sparse_int8_linear));
}

}  // namespace ds_compress::bindings
