// Scores against a window of keys, on the CPU only: see ds_compress/ops/reference/window.py.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "elementwise_cpu.h"

namespace ds_compress::bindings {
namespace {

constexpr int64_t kPiece = 1 << 14;  // elements whose finds fit into a core's cache beside them
constexpr ScalarType kInt32 = ScalarType::Int, kInt64 = ScalarType::Long;

// What one thread found in its pieces, which lie one after the other.
struct Finds {
    std::vector<int32_t> keys, places;
    int64_t above = 0, inside = 0, non_finite = 0;
};

Finds search(const float* scores, const uint8_t* competing, int64_t begin, int64_t end, cpu::Window window,
             int64_t capacity, uint8_t* packed) {
    const cpu::ElementwiseKernels& kernels = cpu::elementwise();
    Finds finds;
    std::vector<int32_t> keys(kPiece), places(kPiece);
    for (int64_t i = begin; i < end; i += kPiece) {
        const cpu::WindowFound found = kernels.mask_window(
            scores + i, competing != nullptr ? competing + i / 8 : nullptr, std::min(kPiece, end - i),
            static_cast<int32_t>(i), window, packed + i / 8, keys.data(), places.data());
        const int64_t room = std::max<int64_t>(0, capacity - static_cast<int64_t>(finds.keys.size()));
        const int64_t taken = std::min(found.inside, room);
        finds.keys.insert(finds.keys.end(), keys.data(), keys.data() + taken);
        finds.places.insert(finds.places.end(), places.data(), places.data() + taken);
        finds.above += found.above;
        finds.inside += found.inside;
        finds.non_finite += found.non_finite;
    }
    return finds;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_window(const Tensor& scores, const std::optional<Tensor>& competing,
                                                       int64_t low, int64_t high, bool magnitude, int64_t capacity) {
    const char* op = "mask_window";
    check(op, "scores", scores, 1, {kFp32});
    const int64_t count = scores.numel();
    require(count <= INT32_MAX, op, ": scores has at most 2^31 - 1 elements, got ", count);
    if (competing) {
        check_same_device(op, "competing", *competing, scores);
        check_bits(op, *competing, count, 0);
    }
    require(INT32_MIN <= low && low <= high && high <= INT32_MAX, op, ": low <= high are int32, got ", low, " and ",
            high);
    require(capacity >= 0, op, ": a capacity of ", capacity, " is negative");

    const Tensor packed = new_bits(scores, count), counts = new_tensor(scores, {3}, kInt64);
    const Tensor keys = new_tensor(scores, {capacity}, kInt32), places = new_tensor(scores, {capacity}, kInt32);
    const cpu::Window window{static_cast<int32_t>(low), static_cast<int32_t>(high), magnitude};
    const int64_t pieces = (count + kPiece - 1) / kPiece;
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), pieces));
    std::vector<Finds> found(static_cast<size_t>(parts));
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t part = first; part < last; part++)
            found[static_cast<size_t>(part)] = search(
                const_data<float>(scores), const_data_or_null<uint8_t>(competing), pieces * part / parts * kPiece,
                std::min(count, pieces * (part + 1) / parts * kPiece), window, capacity, data<uint8_t>(packed));
    });

    int64_t stored = 0, totals[3] = {0, 0, 0};
    auto *all_keys = data<int32_t>(keys), *all_places = data<int32_t>(places);
    for (const Finds& each : found) {
        const int64_t taken = std::min(capacity - stored, static_cast<int64_t>(each.keys.size()));
        std::copy_n(each.keys.data(), taken, all_keys + stored);
        std::copy_n(each.places.data(), taken, all_places + stored);
        stored += taken;
        totals[0] += each.above;
        totals[1] += each.inside;
        totals[2] += each.non_finite;
    }
    std::fill_n(all_keys + stored, capacity - stored, 0);
    std::fill_n(all_places + stored, capacity - stored, 0);
    std::memcpy(data<int64_t>(counts), totals, sizeof totals);
    return {packed, keys, places, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CPU, m) { m.impl("mask_window", TORCH_BOX(&mask_window)); }

}  // namespace ds_compress::bindings
