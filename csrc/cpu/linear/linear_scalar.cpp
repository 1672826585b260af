// Compiled for any CPU: plain loops that the compiler vectorizes for its baseline.
#include "linear.h"
#include "table.h"

namespace ds_compress::cpu {
namespace {

template <class Code>
struct PlainValues {
    using Stored = Code;
    static DSC_INLINE int store(Code* to, Ints a, Ints b) {
        for (int i = 0; i < kLanes; i++) {
            to[i] = static_cast<Code>(a[i]);
            to[kLanes + i] = static_cast<Code>(b[i]);
        }
        return 0;
    }
    struct Correction {
        DSC_INLINE void add(int) {}
        DSC_INLINE int32_t total() const { return 0; }
    };
};

// A panel is 8 zeros and 8 rows of quantized values as they come. Quantized values of x are int16: baseline SSE2
// multiplies no bytes.
struct Int8Scalar {
    using Values = PlainValues<int16_t>;
    using Session = NoSession;
    static constexpr int kColumns = 8;
    static constexpr int64_t kRows = 1;
    static constexpr int64_t kDepth = 8;
    static constexpr int64_t kChunk = INT64_MAX / 2;  // rows of a panel are whole
    static constexpr int64_t kPrefetchParts = 1;
    static constexpr int64_t kAheadBytes = 0;  // prefetches nothing

    static int64_t panel_bytes(int64_t depth) { return (4 + depth) * kColumns; }

    static void pack(const int16_t* rows, int64_t stride, int64_t depth, const int32_t*, uint8_t* panel) {
        memset(panel, 0, 4 * kColumns);
        panel += 4 * kColumns;
        for (int j = 0; j < kColumns; j++)
            for (int64_t k = 0; k < depth; k++) *panel++ = static_cast<uint8_t>(rows[j * stride + k]);
    }

    static void tile(int64_t, const int16_t* quantized, int64_t, const uint8_t* weights, int64_t depth, const uint8_t*,
                     const int32_t* from, int64_t, int32_t* to) {
        const auto* w = reinterpret_cast<const int8_t*>(weights);
        for (int j = 0; j < kColumns; j++, w += depth) {
            int32_t sum = from[j];
            for (int64_t k = 0; k < depth; k++) sum += quantized[k] * w[k];
            to[j] = sum;
        }
    }
};

struct Int4Scalar {
    using Values = PlainValues<int8_t>;
    static constexpr int kColumns = 8;
    static constexpr int64_t kRows = 1;

    static void multiply(int64_t, const Int4Tile& tile) {
        for (int64_t group = 0; group < tile.groups; group++) {
            const int64_t first = group * tile.blocks_per_group, after = first + tile.blocks_per_group;
            const int64_t last = after < tile.blocks ? after : tile.blocks;
            for (int j = 0; j < kColumns; j++) {
                int32_t sum = -tile.excess[group];
                for (int64_t step = first * 4; step < last * 4; step++)
                    for (int i = 0; i < 4; i++) {
                        const uint8_t byte = tile.weights[(step * kColumns + j) * 4 + i];
                        const int8_t* a = tile.quantized + step * 8 + i;
                        sum += (byte & 15) * a[0] + (byte >> 4) * a[4];
                    }
                const float value = static_cast<float>(sum) * tile.scales[group * kColumns + j];
                tile.values[j] = group == 0 ? value : tile.values[j] + value;
            }
        }
    }
};

}  // namespace

const LinearKernels* linear_scalar() {
    static constexpr LinearKernels kTable =
        table<Int8Driver<Int8Scalar>, Int4Driver<Int4Scalar>>(Isa::scalar, kLayoutInt8Scalar, kLayoutInt4Scalar);
    return &kTable;
}

}  // namespace ds_compress::cpu
