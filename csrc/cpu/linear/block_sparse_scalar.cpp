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
        for (int g = 0; g < kStripGroups; begin = part.ends[g++]) {
            Sums group[kBlockOutputs] = {};
            for (int64_t block = begin; block < part.ends[g]; block++) {
                const int16_t* a = quantized + static_cast<int64_t>(part.inputs[block]) * kBlockInputs;
                const int8_t* w = part.values + block * kSparseBlockBytes;
                for (int o = 0; o < kBlockOutputs; o++) group[o].add(a, w + o * kBlockInputs);
            }
            for (int o = 0; o < kBlockOutputs; o++) sums[g * kBlockOutputs + o] += group[o].total();
        }
    }

private:
    // What one output has of a group's blocks; in four parts, so that they are added up once.
    struct Sums {
        int32_t parts[4] = {};

        DSC_INLINE void add(const int16_t* a, const int8_t* w) {
#if defined(DSC_SSE2)  // the compiler does not find pmaddwd
            const __m128i bytes = load_as<__m128i>(w), zero = _mm_setzero_si128();
            const __m128i low = _mm_srai_epi16(_mm_unpacklo_epi8(zero, bytes), 8);
            const __m128i high = _mm_srai_epi16(_mm_unpackhi_epi8(zero, bytes), 8);
            const __m128i sum =
                _mm_add_epi32(_mm_madd_epi16(load_as<__m128i>(a), low), _mm_madd_epi16(load_as<__m128i>(a + 8), high));
            store(parts, _mm_add_epi32(load_as<__m128i>(parts), sum));
#else
            for (int i = 0; i < kBlockInputs; i++) parts[i % 4] += a[i] * w[i];
#endif
        }
        int32_t total() const { return parts[0] + parts[1] + parts[2] + parts[3]; }
    };
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
