// The head of a packed weight, the same for every layout and device. The body is known only to the kernels that own the
// layout; a packed weight is made where it is used and never saved.
#pragma once

#include <cstdint>

namespace ds_compress {

constexpr int64_t kPackedMagic = 0x314B434150435344;  // "DSCPACK1"

struct PackedHeader {
    int64_t magic;
    int64_t layout;
    int64_t rows;      // N, out_features
    int64_t columns;   // K, in_features
    int64_t groups;    // int4 and weight-only: scales of a row; int8: 0
    int64_t spare[3];  // weight-only: group_size, storage, whether there are offsets
};
static_assert(sizeof(PackedHeader) == 64);

// CUDA layouts begin at 16; they are listed with the CUDA kernels.
enum PackedLayout : int64_t {
    kLayoutReference = 0,  // plain torch: row-major
    kLayoutInt8Scalar = 1,
    kLayoutInt8Avx2 = 2,
    kLayoutInt8Avx512 = 3,
    kLayoutInt4Scalar = 4,
    kLayoutInt4Avx2 = 5,
    kLayoutInt4Avx512 = 6,
    kLayoutBlockSparse = 12,  // of plain torch and of every instruction set; see cpu/linear/block_sparse.h
    kLayoutWeightOnly = 7,    // for all CPUs
    kLayoutWeightOnlyReference = 8,
};

inline constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Bytes of a packed weight, as ds_compress/ops/schemas.py promises to tracers: room for the layout of any kernel.
inline constexpr int64_t packed_bytes(int64_t rows, int64_t columns, int64_t bits, int64_t groups) {
    const int64_t row_bytes = round_up(columns, 64) * bits / 8 + 8 + 8 * groups;
    return static_cast<int64_t>(sizeof(PackedHeader)) + round_up(rows, 48) * row_bytes;
}

}  // namespace ds_compress
