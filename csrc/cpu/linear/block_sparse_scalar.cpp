// Compiled for any CPU: plain loops that the compiler vectorizes for its baseline. Here, too, the table is chosen.
#include <stdexcept>
#include <string>

#include "block_sparse_driver.h"

namespace ds_compress::cpu {
namespace {

// int16: baseline SSE2 multiplies no bytes.
struct PlainInt16Values {
    using Stored = int16_t;
    static DSC_INLINE int store(int16_t* to, Ints a, Ints b) {
        for (int i = 0; i < kLanes; i++) {
            to[i] = static_cast<int16_t>(a[i]);
            to[kLanes + i] = static_cast<int16_t>(b[i]);
        }
        return 0;
    }
    struct Correction {
        DSC_INLINE void add(int) {}
        DSC_INLINE int32_t total() const { return 0; }
    };
};

struct BlockSparseScalar {
    using Values = PlainInt16Values;
    static constexpr int kRows = 1;

    static int32_t start(const int32_t*, int64_t) { return 0; }

    static void tile(int64_t, const int16_t* quantized, const StripPart& part, int32_t* sums) {
        int64_t begin = part.begin;
        for (int g = 0; g < kStripGroups; g++)
            for (; begin < part.ends[g]; begin++) {
                const int16_t* a = quantized + static_cast<int64_t>(part.inputs[begin]) * kBlockInputs;
                for (int o = 0; o < kBlockOutputs; o++) {
                    const int8_t* w = part.values + begin * kSparseBlockBytes + o * kBlockInputs;
                    int32_t sum = 0;
                    for (int i = 0; i < kBlockInputs; i++) sum += a[i] * w[i];
                    sums[g * kBlockOutputs + o] += sum;
                }
            }
    }
};

const BlockSparseKernels* table_of(Isa isa) {
    switch (isa) {
        case Isa::scalar:
            return block_sparse_scalar();
#if defined(__x86_64__)
        case Isa::avx2:
            return block_sparse_avx2();
        case Isa::avx512:
            return block_sparse_avx512();
#endif
        default:
            return nullptr;
    }
}

}  // namespace

const BlockSparseKernels* block_sparse_scalar() {
    static constexpr BlockSparseKernels kTable = block_sparse_table<BlockSparseDriver<BlockSparseScalar>>(Isa::scalar);
    return &kTable;
}

const BlockSparseKernels& block_sparse_kernels() {
    static const BlockSparseKernels* const chosen = table_of(isa());
    if (chosen == nullptr)
        throw std::runtime_error(std::string("the linear kernels were built without ") + name_of(isa()));
    return *chosen;
}

}  // namespace ds_compress::cpu
