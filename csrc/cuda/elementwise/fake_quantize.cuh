// Fake quantization of the rows of a matrix. Rows that a warp or a block finds in cache again are measured and quantized
// by one kernel; the pieces of longer ones are measured by many blocks, which meet in the row's scale and offset.
#pragma once

#include "ds_compress/math.h"
#include "grid.cuh"

namespace ds_compress::elementwise {

struct Codes {
    float low, high, steps;
};

/// What values span, as integers in their order (see `ordered`), so that atomics can join them.
struct Span {
    int lowest;
    int highest;
    unsigned largest;  // magnitude bits: NaN and Inf win

    static DSC_DEVICE Span empty() { return {0x7fffffff, static_cast<int>(0x80000000u), 0}; }
};

/// Its own inverse.
DSC_DEVICE int ordered(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
DSC_DEVICE int ordered(float value) { return ordered(static_cast<int>(math::bits_of(value))); }
DSC_DEVICE float unordered(int key) { return math::float_of(static_cast<uint32_t>(ordered(key))); }

DSC_DEVICE Span with(Span span, float value) {
    const int key = ordered(value);
    return {min(span.lowest, key), max(span.highest, key),
            max(span.largest, math::bits_of(value) & math::kMagnitudeBits)};
}

template <bool symmetric>
DSC_DEVICE math::ScaleAndOffset range_of(Span span, int64_t columns, float steps) {
    if (columns == 0) span = {0, 0, 0};
    if (symmetric) return {math::row_scale(span.largest, steps), 0.0f};
    const float not_a_number = math::float_of(math::kNanBits);
    if (span.largest >= math::kInfinityBits) return {not_a_number, not_a_number};
    return math::row_range(math::add(unordered(span.lowest), 0.0f), unordered(span.highest), steps);
}

/// The largest finite value of a dtype.
template <class T>
struct Largest;
template <>
struct Largest<float> {
    static constexpr float value = math::kLargestFloat;
};
template <>
struct Largest<__nv_bfloat16> {
    static constexpr float value = math::kLargestBf16;
};
template <>
struct Largest<__half> {
    static constexpr float value = math::kLargestFp16;
};

/// A row's range as its values are worked on: at a quarter of their size where they are extreme (see math.h).
struct Working {
    math::ScaleAndOffset range;
    float shrink, limit;
};

template <class T>
DSC_DEVICE Working working(math::ScaleAndOffset range) {
    if (!math::is_extreme(range, Largest<T>::value)) return {range, 1.0f, 0.0f};
    return {{math::multiply(range.scale, math::kShrink), math::multiply(range.offset, math::kShrink)},
            math::kShrink,
            math::multiply(Largest<T>::value, math::kShrink)};
}

template <bool symmetric>
DSC_DEVICE float rounded(float value, const Working& work) {
    value = math::multiply(value, work.shrink);
    if (!symmetric) value = math::subtract(value, work.range.offset);
    return math::round_half_even(math::divide(value, work.range.scale));
}

template <bool symmetric>
DSC_DEVICE float read_back(float value, const Working& work, const Codes& codes) {
    value = math::multiply(math::clamp(rounded<symmetric>(value, work), codes.low, codes.high), work.range.scale);
    if (!symmetric) value = math::add(value, work.range.offset);
    if (work.limit > 0.0f) value = math::multiply(math::clamp(value, -work.limit, work.limit), math::kGrow);
    return value;
}

/// Rows are whole vectors at 16-byte boundaries.
template <class T>
DSC_DEVICE bool is_whole(const void* x, const void* y, int64_t columns) {
    return columns % Vector<T>::count == 0 &&
           (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y)) % 16 == 0;
}

/// Calls each(index of vector or element) for the share of one thread of `sharing` in columns [begin, end).
template <class T, class OnVector, class OnElement>
DSC_DEVICE void for_share(int64_t begin, int64_t end, int member, int sharing, bool whole, const OnVector& on_vector,
                          const OnElement& on_element) {
    constexpr int width = Vector<T>::count;
    if (whole)
        for (int64_t i = begin + static_cast<int64_t>(member) * width; i < end; i += static_cast<int64_t>(sharing) * width)
            on_vector(i);
    else
        for (int64_t i = begin + member; i < end; i += sharing) on_element(i);
}

template <class T>
DSC_DEVICE Span measure_share(const T* row, int64_t begin, int64_t end, int member, int sharing, bool whole) {
    Span span = Span::empty();
    for_share<T>(
        begin, end, member, sharing, whole,
        [&](int64_t i) {
            const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(row + i);
#pragma unroll
            for (int j = 0; j < Vector<T>::count; j++) span = with(span, to_float(vector.values[j]));
        },
        [&](int64_t i) { span = with(span, to_float(row[i])); });
    return span;
}

template <class T, bool symmetric>
DSC_DEVICE void quantize_share(const T* row, T* out, int64_t begin, int64_t end, int member, int sharing, bool whole,
                               math::ScaleAndOffset range, const Codes& codes) {
    const Working work = working<T>(range);
    for_share<T>(
        begin, end, member, sharing, whole,
        [&](int64_t i) {
            Vector<T> vector = *reinterpret_cast<const Vector<T>*>(row + i);
#pragma unroll
            for (int j = 0; j < Vector<T>::count; j++)
                vector.values[j] = from_float<T>(read_back<symmetric>(to_float(vector.values[j]), work, codes));
            *reinterpret_cast<Vector<T>*>(out + i) = vector;
        },
        [&](int64_t i) { out[i] = from_float<T>(read_back<symmetric>(to_float(row[i]), work, codes)); });
}

/// The span over a warp.
DSC_DEVICE Span join_warp(Span span) {
    // With the sign bit turned, unsigned integers have the order of signed ones; all bits turned, the reverse of it.
    constexpr unsigned turn = 0x80000000u, reverse = 0x7fffffffu;
    span.lowest = static_cast<int>(__reduce_max_sync(~0u, static_cast<unsigned>(span.lowest) ^ reverse) ^ reverse);
    span.highest = static_cast<int>(__reduce_max_sync(~0u, static_cast<unsigned>(span.highest) ^ turn) ^ turn);
    span.largest = __reduce_max_sync(~0u, span.largest);
    return span;
}

/// The span over the threads that share a row: a warp, or the whole block.
template <int sharing>
DSC_DEVICE Span join(Span span) {
    span = join_warp(span);
    if constexpr (sharing > 32) {
        DSC_SHARED(Span, parts, warps);
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = span;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < warps; i++)
            span = {min(span.lowest, parts[i].lowest), max(span.highest, parts[i].highest),
                    max(span.largest, parts[i].largest)};
    }
    return span;
}

/// Measures and quantizes; a row belongs to `sharing` threads.
template <class T, int sharing, bool symmetric>
__global__ void __launch_bounds__(threads)
    fake_quantize_rows_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t rows, int64_t columns,
                              float* __restrict__ scale, float* __restrict__ offset, Codes codes) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (threads / sharing) + threadIdx.x / sharing;
    if (row >= rows) return;  // whole warps: every thread of a row leaves
    const int member = static_cast<int>(threadIdx.x) % sharing;
    const bool whole = is_whole<T>(x, y, columns);
    const T* const from = x + row * columns;
    const Span span = join<sharing>(measure_share(from, 0, columns, member, sharing, whole));
    const math::ScaleAndOffset range = range_of<symmetric>(span, columns, codes.steps);
    if (member == 0) {
        scale[row] = range.scale;
        if (!symmetric) offset[row] = range.offset;
    }
    quantize_share<T, symmetric>(from, y + row * columns, 0, columns, member, sharing, whole, range, codes);
}

// --- long rows: until its range is known, a row's highest or largest lies in its scale, its lowest in its offset -----

template <bool symmetric>
__global__ void __launch_bounds__(threads) begin_spans_kernel(int64_t rows, float* scale, float* offset) {
    for (int64_t row = first_item(); row < rows; row += stride()) {
        const Span span = Span::empty();
        reinterpret_cast<int*>(scale)[row] = symmetric ? static_cast<int>(span.largest) : span.highest;
        if (!symmetric) reinterpret_cast<int*>(offset)[row] = span.lowest;
    }
}

/// The part of a row that this block works on.
struct Piece {
    int64_t row, begin, end;
    static DSC_DEVICE Piece mine(int64_t columns, int64_t size, unsigned pieces_per_row) {
        const int64_t begin = blockIdx.x % pieces_per_row * size;
        return {blockIdx.x / pieces_per_row, begin, begin + size < columns ? begin + size : columns};
    }
};

/// An asymmetric row with a value that is not finite has the highest key of all, a NaN.
template <class T, bool symmetric>
__global__ void __launch_bounds__(threads)
    join_spans_kernel(const T* __restrict__ x, int64_t columns, int64_t size, unsigned pieces_per_row, float* scale,
                      float* offset) {
    const Piece piece = Piece::mine(columns, size, pieces_per_row);
    const Span span = join_warp(measure_share(x + piece.row * columns, piece.begin, piece.end,
                                              static_cast<int>(threadIdx.x), threads, is_whole<T>(x, nullptr, columns)));
    if (threadIdx.x % 32 != 0) return;
    if (symmetric) {
        atomicMax(reinterpret_cast<unsigned*>(scale) + piece.row, span.largest);
    } else {
        const bool finite = span.largest < math::kInfinityBits;
        atomicMax(reinterpret_cast<int*>(scale) + piece.row, finite ? span.highest : 0x7fffffff);
        atomicMin(reinterpret_cast<int*>(offset) + piece.row, span.lowest);
    }
}

template <bool symmetric>
__global__ void __launch_bounds__(threads)
    finish_spans_kernel(int64_t rows, int64_t columns, float* scale, float* offset, float steps) {
    for (int64_t row = first_item(); row < rows; row += stride()) {
        Span span = {0, 0, math::bits_of(scale[row])};
        if (!symmetric) {
            span.highest = static_cast<int>(math::bits_of(scale[row]));
            span.lowest = static_cast<int>(math::bits_of(offset[row]));
            span.largest = span.highest == 0x7fffffff ? math::kNanBits : 0u;
        }
        const math::ScaleAndOffset range = range_of<symmetric>(span, columns, steps);
        scale[row] = range.scale;
        if (!symmetric) offset[row] = range.offset;
    }
}

/// With ranges that are known, one for each row.
template <class T, bool symmetric>
__global__ void __launch_bounds__(threads)
    quantize_pieces_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t columns, int64_t size,
                           unsigned pieces_per_row, const float* __restrict__ scale,
                           const float* __restrict__ offset, Codes codes) {
    const Piece piece = Piece::mine(columns, size, pieces_per_row);
    const math::ScaleAndOffset range = {scale[piece.row], symmetric ? 0.0f : offset[piece.row]};
    quantize_share<T, symmetric>(x + piece.row * columns, y + piece.row * columns, piece.begin, piece.end,
                                 static_cast<int>(threadIdx.x), threads, is_whole<T>(x, y, columns), range, codes);
}

/// A thread makes one byte of the kept bits.
template <class T, bool symmetric>
__global__ void __launch_bounds__(threads, 4)  // 64 registers: with fewer, ptxas spills
    kept_bits_kernel(const T* __restrict__ x, int64_t rows, int64_t columns, const float* __restrict__ scale,
                     const float* __restrict__ offset, Codes codes, uint8_t* __restrict__ kept) {
    const int64_t count = rows * columns;
    for (int64_t byte = first_item(); byte * 8 < count; byte += stride()) {
        unsigned bits = 0;
        int64_t row = byte * 8 / columns, column = byte * 8 % columns;
        for (int j = 0; j < 8 && byte * 8 + j < count; j++) {
            const math::ScaleAndOffset range = {scale[row], symmetric ? 0.0f : offset[row]};
            const float code = rounded<symmetric>(to_float(x[byte * 8 + j]), working<T>(range));
            if (codes.low <= code && code <= codes.high) bits |= 1u << j;
            if (++column == columns) {
                column = 0;
                row++;
            }
        }
        kept[byte] = static_cast<uint8_t>(bits);
    }
}

}  // namespace ds_compress::elementwise
