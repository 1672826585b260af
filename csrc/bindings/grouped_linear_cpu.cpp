// The integer linear layers of many experts on CPU tensors: one parallel region for all of them, in which every thread
// has about as much to do. An expert is multiplied by the kernels of one linear layer, so the bits are those.
#include "grouped_linear.h"

#include <algorithm>

#include "linear_cpu.h"

namespace ds_compress::bindings {
namespace {

using cpu::LinearKernels;
using cpu::Range;
using Kernel = void (*)(const cpu::LinearCall&, Range, Range, void*);

// A panel of weights that comes from memory takes as long as so many rows take to be multiplied by it.
constexpr int64_t kRowsOfAPanel = 8;

/// An expert that has rows. A panel of its weights costs `cost`, and the experts before it cost `before` in all.
struct Piece {
    int64_t expert;
    Range rows;
    int64_t cost, before;
};

std::vector<int64_t> ends_of(const GroupedCall& call) {
    std::vector<int64_t> ends(call.experts);
    if (call.offsets.scalar_type() == ScalarType::Int)
        std::copy_n(const_data<int32_t>(call.offsets), call.experts, ends.begin());
    else
        std::copy_n(const_data<int64_t>(call.offsets), call.experts, ends.begin());
    int64_t before = 0;
    for (int64_t expert = 0; expert < call.experts; before = ends[expert++])
        require(before <= ends[expert] && ends[expert] <= call.rows, "offsets never decrease and end within the ",
                call.rows, " rows of x, got ", ends[expert], " for expert ", expert, " behind ", before);
    return ends;
}

/// Experts without rows are none of them, so nothing of theirs is read.
std::vector<Piece> pieces_of(const std::vector<int64_t>& ends, int64_t panels) {
    std::vector<Piece> pieces;
    int64_t begin = 0, before = 0;
    for (size_t expert = 0; expert < ends.size(); begin = ends[expert++]) {
        if (begin == ends[expert]) continue;
        const int64_t cost = ends[expert] - begin + kRowsOfAPanel;
        pieces.push_back({static_cast<int64_t>(expert), {begin, ends[expert]}, cost, before});
        before += cost * panels;
    }
    return pieces;
}

/// The panels of a piece whose costs begin between `from` and `to`: every panel is in one such part.
Range panels_between(const Piece& piece, int64_t panels, int64_t from, int64_t to) {
    const auto panel_of = [&](int64_t cost) {
        return std::clamp<int64_t>((cost - piece.before + piece.cost - 1) / piece.cost, 0, panels);
    };
    return {panel_of(from), panel_of(to)};
}

class Experts {
public:
    Experts(const GroupedCall& call, int64_t layout) : call_(call), layout_(layout) {}

    void multiply(const LinearKernels& kernels, Kernel kernel) const {
        const std::vector<int64_t> ends = ends_of(call_);
        const int64_t panels = panels_of(kernels, call_.weight.rows);
        clear_from(ends.back());
        if (panels == 0) return;
        const std::vector<Piece> pieces = pieces_of(ends, panels);
        if (pieces.empty()) return;
        for (const Piece& piece : pieces) check_head(piece.expert);
        const int64_t total = pieces.back().before + pieces.back().cost * panels;
        const int64_t bytes = kernels.scratch_bytes(call_.weight.columns, call_.weight.groups);
        const auto work = [&](int64_t from, int64_t to) {
            for (const Piece& piece : pieces) {
                const Range part = panels_between(piece, panels, from, to);
                if (part.begin < part.end) kernel(of_expert(piece.expert), piece.rows, part, thread_scratch(bytes));
            }
        };
        const bool serial = ends.back() * call_.weight.rows * call_.weight.columns < kSerialProducts;
        const int64_t parts = serial ? 1 : torch::stable::get_num_threads();
        if (parts == 1) return work(0, total);
        torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
            for (int64_t part = begin; part < end; part++) work(total * part / parts, total * (part + 1) / parts);
        });
    }

private:
    const uint8_t* packed_of(int64_t expert) const {
        return const_data<uint8_t>(call_.packed) + expert * call_.packed.size(1);
    }

    void check_head(int64_t expert) const {
        const PackedHeader header = header_at(packed_of(expert), call_.packed.size(1), layout_);
        require(header.rows == call_.weight.rows && header.columns == call_.weight.columns &&
                    header.groups == call_.weight.groups,
                "the weights of experts are alike, but expert ", expert, " has (", header.rows, ", ", header.columns,
                ") in ", header.groups, " groups");
    }

    void clear_from(int64_t row) const {
        const int64_t row_bytes = call_.weight.rows * static_cast<int64_t>(call_.y.element_size());
        std::memset(static_cast<uint8_t*>(call_.y.mutable_data_ptr()) + row * row_bytes, 0,
                    static_cast<size_t>((call_.rows - row) * row_bytes));
    }

    cpu::LinearCall of_expert(int64_t expert) const {
        const auto& [rows, columns, groups, group_size] = call_.weight;
        const auto own = [&](const float* of_all, int64_t count) {
            return of_all == nullptr ? nullptr : of_all + expert * count;
        };
        return {call_.x.const_data_ptr(),
                type_of(call_.x),
                call_.rows,
                {packed_of(expert) + sizeof(PackedHeader), rows, columns, groups, group_size},
                own(call_.weight_scale, rows),
                own(call_.bias, rows),
                own(call_.input_scale, 1),
                call_.steps,
                cpu::Activation::none,
                call_.y.mutable_data_ptr(),
                type_of(call_.y)};
    }

    const GroupedCall& call_;
    int64_t layout_;
};

struct Cpu {
    static WeightShape int8_experts(const Tensor&, const Tensor& packed, const Tensor&) {
        const PackedHeader header = first_head(packed, cpu::linear_kernels().int8_layout);
        return {header.rows, header.columns};
    }

    static WeightShape int4_experts(const Tensor&, const Tensor& packed, int64_t out_features, int64_t group_size) {
        const PackedHeader header = first_head(packed, cpu::linear_kernels().int4_layout);
        require(out_features == header.rows, "these weights have ", header.rows, " out_features, got ", out_features);
        const WeightShape weight{header.rows, header.columns, header.groups, group_size};
        require_groups(group_size, weight);
        return weight;
    }

    static void int8_grouped_linear(const GroupedCall& call) {
        const LinearKernels& kernels = cpu::linear_kernels();
        Experts(call, kernels.int8_layout).multiply(kernels, kernels.int8_linear);
    }

    static void int4_grouped_linear(const GroupedCall& call) {
        const LinearKernels& kernels = cpu::linear_kernels();
        Experts(call, kernels.int4_layout).multiply(kernels, kernels.int4_linear);
    }

private:
    static PackedHeader first_head(const Tensor& packed, int64_t layout) {
        require(holds_header(packed, packed.size(1)), "a packed weight is contiguous uint8 (bytes,), got experts of ",
                packed.size(1), " bytes");
        return header_at(const_data<uint8_t>(packed), packed.size(1), layout);
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CPU, m) { GroupedLinear<Cpu>::register_in(m); }

}  // namespace ds_compress::bindings
