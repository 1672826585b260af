// Fake quantization of the rows of a matrix. A row that fits into the registers of some lanes, a warp or a block is
// read once. The pieces of longer rows are measured by many blocks, which meet in the row's scale and offset, and then
// read again. Rows that do not lie on vectors of 16 bytes go the loose way, element by element.
#pragma once

#include "grid.cuh"

namespace ds_compress::elementwise {

struct QuantRange {
    float min, max;
    float steps;
};

// --- ranges --------------------------------------------------------------------------------------------------------

/// What values span: their largest magnitude, or the least and the greatest. NaN wins.
template <bool symmetric>
struct Span;

template <>
struct Span<true> {
    float largest = 0.0f;

    DSC_DEVICE void add(float value) { largest = larger(largest, fabsf(value)); }
    DSC_DEVICE math::ScaleAndOffset range(int64_t, const math::Divisor& steps) const {
        if (math::bits_of(largest) >= math::kInfinityBits) return {math::float_of(math::kNanBits), 0.0f};
        const float scale = math::scale_or_zero(largest, steps);
        return {scale == 0.0f ? math::float_of(math::kSmallestScaleBits) : scale, 0.0f};
    }
};

template <>
struct Span<false> {
    float lowest = math::float_of(math::kInfinityBits), highest = -math::float_of(math::kInfinityBits);

    DSC_DEVICE void add(float value) {
        lowest = smaller(lowest, value);
        highest = larger(highest, value);
    }
    DSC_DEVICE math::ScaleAndOffset range(int64_t columns, const math::Divisor& steps) const {
        const float not_a_number = math::float_of(math::kNanBits), smallest = math::float_of(math::kSmallestScaleBits);
        if (columns == 0) return {smallest, 0.0f};
        if (!(fabsf(lowest) <= math::kLargestFloat && fabsf(highest) <= math::kLargestFloat))
            return {not_a_number, not_a_number};
        const float low = math::add(lowest, 0.0f);  // of the two zeros, one
        float span = math::subtract(highest, low);
        const bool overflows = span > math::kLargestFloat;
        if (overflows)
            span = math::subtract(math::multiply(highest, math::kShrink), math::multiply(low, math::kShrink));
        float width = math::scale_or_zero(span, steps);
        if (width == 0.0f) return {smallest, low};
        if (overflows) width = math::multiply(width, math::kGrow);
        if (width > math::kLargestFloat) return {not_a_number, not_a_number};
        // A zero has the sign of what it was.
        const float steps_below = math::with_sign_of(math::quotient(low, math::divisor_of(width)), low);
        const float offset = math::multiply(math::round_half_even(steps_below), width);
        return {width, math::clamp(offset, -math::kLargestFloat, math::kLargestFloat)};
    }
};

/// Integers in the order of floats, and back: its own inverse. Positive NaNs are the largest.
DSC_DEVICE int ordered(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
DSC_DEVICE int ordered(float value) { return ordered(static_cast<int>(math::bits_of(value))); }
DSC_DEVICE float unordered(int key) { return math::float_of(static_cast<uint32_t>(ordered(key))); }

/// The largest key among `sharing` (up to 32) neighbouring lanes.
template <int sharing>
DSC_DEVICE unsigned largest_key(unsigned key) {
    if constexpr (sharing >= 32) {
        return __reduce_max_sync(~0u, key);
    } else {
#pragma unroll
        for (int distance = sharing / 2; distance > 0; distance /= 2)
            key = max(key, __shfl_xor_sync(~0u, key, distance));
        return key;
    }
}

/// The span over lanes of a warp. A NaN is in both ends, and found in the highest.
template <int sharing, bool symmetric>
DSC_DEVICE Span<symmetric> join_warp(const Span<symmetric>& span) {
    if constexpr (symmetric) {
        return {math::float_of(largest_key<sharing>(math::bits_of(span.largest)))};
    } else {
        // With the sign bit turned, unsigned integers have the order of signed ones; all bits turned, the reverse of
        // it.
        constexpr unsigned turn = 0x80000000u, reverse = 0x7fffffffu;
        const unsigned low = largest_key<sharing>(static_cast<unsigned>(ordered(span.lowest)) ^ reverse) ^ reverse;
        const unsigned high = largest_key<sharing>(static_cast<unsigned>(ordered(span.highest)) ^ turn) ^ turn;
        return {unordered(static_cast<int>(low)), unordered(static_cast<int>(high))};
    }
}

DSC_DEVICE Span<true> both(const Span<true>& a, const Span<true>& b) { return {larger(a.largest, b.largest)}; }
DSC_DEVICE Span<false> both(const Span<false>& a, const Span<false>& b) {
    return {smaller(a.lowest, b.lowest), larger(a.highest, b.highest)};
}

/// The span over the threads that share a row: lanes of a warp, or the whole block, to which all threads then come.
template <int sharing, bool symmetric>
DSC_DEVICE Span<symmetric> join(Span<symmetric> span) {
    span = join_warp<sharing>(span);
    if constexpr (sharing > 32) {
        DSC_SHARED(Span<symmetric>, parts, sharing / 32);
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = span;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < sharing / 32; i++) span = both(span, parts[i]);
    }
    return span;
}

// --- values --------------------------------------------------------------------------------------------------------

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
    math::Divisor divisor;
};

template <class T>
DSC_DEVICE Working working(math::ScaleAndOffset range) {
    if (!math::is_extreme(range, Largest<T>::value)) return {range, 1.0f, 0.0f, math::divisor_of(range.scale)};
    range = {math::multiply(range.scale, math::kShrink), math::multiply(range.offset, math::kShrink)};
    return {range, math::kShrink, math::multiply(Largest<T>::value, math::kShrink), math::divisor_of(range.scale)};
}

DSC_DEVICE bool is_unclipped(float q, const QuantRange& quant) { return quant.min <= q && q <= quant.max; }

/// The quantized value before it is clamped.
template <bool symmetric>
DSC_DEVICE float rounded(float value, const Working& work) {
    value = math::multiply(value, work.shrink);
    if (!symmetric) value = math::subtract(value, work.range.offset);
    return math::round_half_even(math::any_quotient(value, work.divisor));
}

template <bool symmetric>
DSC_DEVICE float read_back(float q, const Working& work, const QuantRange& quant) {
    float value = math::multiply(math::clamp(q, quant.min, quant.max), work.range.scale);
    if (!symmetric) value = math::add(value, work.range.offset);
    if (work.limit > 0.0f) value = math::multiply(math::clamp(value, -work.limit, work.limit), math::kGrow);
    return value;
}

/// Quantizes a vector by ranges that are given; whether each element is kept, as bits.
template <bool symmetric, class T>
DSC_DEVICE unsigned quantize_vector(Vector<T>& vector, const Working& work, const QuantRange& quant, bool wants_mask) {
    constexpr int width = Vector<T>::count;
    float values[width];
    unpack(vector, values);
    unsigned mask = 0;
#pragma unroll
    for (int j = 0; j < width; j++) {
        const float q = rounded<symmetric>(values[j], work);
        if (wants_mask && is_unclipped(q, quant)) mask |= 1u << j;
        values[j] = read_back<symmetric>(q, work, quant);
    }
    vector = pack<T>(values);
    return mask;
}

/// The same by the measured range of the row: no value is far outside of it, and in a row with a NaN or Inf the scale
/// is NaN, and so is all that it is multiplied by. What most rows do not need is asked for once a vector.
template <bool symmetric, class T>
DSC_DEVICE unsigned quantize_measured(Vector<T>& vector, const Working& work, const QuantRange& quant,
                                      bool wants_mask) {
    constexpr int width = Vector<T>::count;
    float values[width];
    unpack(vector, values);
    if (work.shrink != 1.0f) {
#pragma unroll
        for (int j = 0; j < width; j++) values[j] = math::multiply(values[j], work.shrink);
    }
    if (!symmetric) {
#pragma unroll
        for (int j = 0; j < width; j++) values[j] = math::subtract(values[j], work.range.offset);
    }
    float lifted[width];
#pragma unroll
    for (int j = 0; j < width; j++) lifted[j] = values[j];
    if (work.divisor.lift != 1.0f) {
#pragma unroll
        for (int j = 0; j < width; j++) lifted[j] = math::multiply(values[j], work.divisor.lift);
    }
    unsigned mask = 0;
#pragma unroll
    for (int j = 0; j < width; j++) {
        const float whole =
            math::subtract(math::add(math::lifted_quotient(lifted[j], work.divisor), math::kRound), math::kRound);
        // A zero has the sign of what it was.
        const float q = math::float_of(math::bits_of(whole) | (math::bits_of(values[j]) & ~math::kMagnitudeBits));
        if (wants_mask && is_unclipped(q, quant)) mask |= 1u << j;
        const float above = q < quant.min ? quant.min : q;  // fmaxf would make +0 of -0
        values[j] = math::multiply(fminf(above, quant.max), work.range.scale);
        if (!symmetric) values[j] = math::add(values[j], work.range.offset);
    }
    if (work.limit > 0.0f) {
#pragma unroll
        for (int j = 0; j < width; j++)
            values[j] = math::multiply(math::clamp(values[j], -work.limit, work.limit), math::kGrow);
    }
    vector = pack<T>(values);
    return mask;
}

/// Stores the bits of vector `i` of the matrix, where the rows are whole bytes of them. Lanes 2 i and 2 i + 1 have
/// neighbouring vectors, or neither has one; all lanes of the warp come here.
template <int width>
DSC_DEVICE void store_mask(uint8_t* mask, int64_t i, bool exists, unsigned bits) {
    if constexpr (width == 4) {
        bits |= __shfl_xor_sync(~0u, bits, 1) << 4;
        exists = exists && threadIdx.x % 2 == 0;
        i /= 2;
    }
    if (exists) mask[i] = static_cast<uint8_t>(bits);
}

// --- rows in registers ---------------------------------------------------------------------------------------------

template <int sharing>
constexpr int threads_for = sharing > 32 ? sharing : threads;

/// Measures and quantizes rows of whole vectors, each by `sharing` threads with `depth` vectors in registers: lanes of
/// a warp, or a block. kept: null, or for rows of whole bytes of it.
template <class T, int sharing, int depth, bool symmetric>
__global__ void __launch_bounds__(threads_for<sharing>, 1)
    fake_quantize_rows_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t rows, int columns,
                              float* __restrict__ scale, float* __restrict__ offset, QuantRange quant,
                              math::Divisor steps, uint8_t* __restrict__ mask) {
    constexpr int width = Vector<T>::count;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (threads_for<sharing> / sharing) + threadIdx.x / sharing;
    const int member = static_cast<int>(threadIdx.x) % sharing;
    const int vectors = row < rows ? columns / width : 0;
    const T* const from = x + row * columns + member * width;
    T* const to = y + row * columns + member * width;
    Vector<T> held[depth];
#pragma unroll
    for (int d = 0; d < depth; d++)
        if (d * sharing + member < vectors) held[d] = load_vector(from + d * sharing * width);
    Span<symmetric> span;
#pragma unroll
    for (int d = 0; d < depth; d++) {
        if (d * sharing + member >= vectors) continue;
        float values[width];
        unpack(held[d], values);
#pragma unroll
        for (int j = 0; j < width; j++) span.add(values[j]);
    }
    const math::ScaleAndOffset range = join<sharing>(span).range(columns, steps);
    if (member == 0 && row < rows) {
        scale[row] = range.scale;
        if (!symmetric) offset[row] = range.offset;
    }
    const Working work = working<T>(range);
#pragma unroll
    for (int d = 0; d < depth; d++) {
        const int i = d * sharing + member;
        unsigned bits = 0;
        if (i < vectors) {
            bits = quantize_measured<symmetric>(held[d], work, quant, mask != nullptr);
            store_vector(to + d * sharing * width, held[d]);
        }
        if (mask != nullptr) store_mask<width>(mask, row * (columns / width) + i, i < vectors, bits);
    }
}

// --- rows that are not whole vectors: a warp each, element by element ----------------------------------------------

template <class T, bool symmetric>
__global__ void __launch_bounds__(threads)
    fake_quantize_loose_rows_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t rows, int64_t columns,
                                    float* __restrict__ scale, float* __restrict__ offset, QuantRange quant,
                                    math::Divisor steps) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32;
    if (row >= rows) return;  // whole warps
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const T* const from = x + row * columns;
    Span<symmetric> span;
    for (int64_t i = lane; i < columns; i += 32) span.add(to_float(from[i]));
    const math::ScaleAndOffset range = join_warp<32>(span).range(columns, steps);
    if (lane == 0) {
        scale[row] = range.scale;
        if (!symmetric) offset[row] = range.offset;
    }
    const Working work = working<T>(range);
    for (int64_t i = lane; i < columns; i += 32)
        y[row * columns + i] =
            from_float<T>(read_back<symmetric>(rounded<symmetric>(to_float(from[i]), work), work, quant));
}

// --- long rows: until its range is known, a row's highest or largest lies in its scale, its lowest in its offset ---

template <bool symmetric>
__global__ void __launch_bounds__(threads) begin_spans_kernel(int64_t rows, float* scale, float* offset) {
    for (int64_t row = first_item(); row < rows; row += stride()) {
        const Span<symmetric> span;
        if constexpr (symmetric) {
            scale[row] = span.largest;
        } else {
            reinterpret_cast<int*>(scale)[row] = ordered(span.highest);
            reinterpret_cast<int*>(offset)[row] = ordered(span.lowest);
        }
    }
}

constexpr int piece_vectors = 4;  // of a thread
template <class T>
constexpr int64_t piece_columns = static_cast<int64_t>(threads) * piece_vectors * Vector<T>::count;

/// Rows that begin at multiples of 16 bytes, so that their pieces do.
template <class T>
DSC_DEVICE bool has_whole_vectors(const void* x, const void* y, int64_t rows, int64_t columns) {
    return (rows == 1 || columns % Vector<T>::count == 0) && is_aligned(x) && is_aligned(y);
}

/// Block b measures pieces b, b + blocks_per_row, ... of its row.
template <class T, bool symmetric>
__global__ void __launch_bounds__(threads) join_spans_kernel(const T* __restrict__ x, int64_t rows, int64_t columns,
                                                             unsigned blocks_per_row, float* scale, float* offset) {
    constexpr int width = Vector<T>::count;
    const int64_t row = blockIdx.x / blocks_per_row;
    const T* const from = x + row * columns;
    const bool whole = has_whole_vectors<T>(x, nullptr, rows, columns);
    Span<symmetric> span;
    for (int64_t begin = blockIdx.x % blocks_per_row * piece_columns<T>; begin < columns;
         begin += blocks_per_row * piece_columns<T>) {
        if (whole && begin + piece_columns<T> <= columns) {
            Vector<T> held[piece_vectors];
#pragma unroll
            for (int u = 0; u < piece_vectors; u++)
                held[u] = load_vector(from + begin + (u * threads + static_cast<int>(threadIdx.x)) * width);
#pragma unroll
            for (int u = 0; u < piece_vectors; u++)
#pragma unroll
                for (int j = 0; j < width; j++) span.add(to_float(held[u].values[j]));
        } else {
            const int64_t end = begin + piece_columns<T> < columns ? begin + piece_columns<T> : columns;
#pragma unroll 1
            for (int64_t i = begin + threadIdx.x; i < end; i += threads) span.add(to_float(from[i]));
        }
    }
    span = join<threads>(span);
    if (threadIdx.x != 0) return;
    if constexpr (symmetric) {
        atomicMax(reinterpret_cast<unsigned*>(scale) + row, math::bits_of(span.largest));
    } else {
        atomicMax(reinterpret_cast<int*>(scale) + row, ordered(span.highest));
        atomicMin(reinterpret_cast<int*>(offset) + row, ordered(span.lowest));
    }
}

template <bool symmetric>
__global__ void __launch_bounds__(threads)
    finish_spans_kernel(int64_t rows, int64_t columns, float* scale, float* offset, math::Divisor steps) {
    for (int64_t row = first_item(); row < rows; row += stride()) {
        Span<symmetric> span;
        if constexpr (symmetric) {
            span = {scale[row]};
        } else {
            span = {unordered(reinterpret_cast<int*>(offset)[row]), unordered(reinterpret_cast<int*>(scale)[row])};
        }
        const math::ScaleAndOffset range = span.range(columns, steps);
        scale[row] = range.scale;
        if (!symmetric) offset[row] = range.offset;
    }
}

/// With ranges that are known, one for each row. `measured`: they were measured just now, so that the last pieces,
/// which come first, may still be in the cache.
template <class T, bool symmetric, bool measured>
__global__ void __launch_bounds__(threads, 4)  // with the registers that ptxas chooses it spills
    quantize_pieces_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t rows, int64_t columns,
                           unsigned pieces_per_row, const float* __restrict__ scale, const float* __restrict__ offset,
                           QuantRange quant, uint8_t* __restrict__ mask) {
    constexpr int width = Vector<T>::count;
    const unsigned piece = measured ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int64_t row = piece / pieces_per_row, begin = piece % pieces_per_row * piece_columns<T>;
    const T* const from = x + row * columns;
    T* const to = y + row * columns;
    const Working work = working<T>({scale[row], symmetric ? 0.0f : offset[row]});
    if (has_whole_vectors<T>(x, y, rows, columns) && begin + piece_columns<T> <= columns) {
        Vector<T> held[piece_vectors];
#pragma unroll
        for (int u = 0; u < piece_vectors; u++)
            held[u] = load_vector(from + begin + (u * threads + static_cast<int>(threadIdx.x)) * width);
#pragma unroll
        for (int u = 0; u < piece_vectors; u++) {
            const int i = u * threads + static_cast<int>(threadIdx.x);
            const unsigned bits = measured ? quantize_measured<symmetric>(held[u], work, quant, mask != nullptr)
                                           : quantize_vector<symmetric>(held[u], work, quant, mask != nullptr);
            store_passing_vector(to + begin + i * width, held[u]);
            if (mask != nullptr) store_mask<width>(mask, (row * columns + begin) / width + i, true, bits);
        }
        return;
    }
    const int64_t end = begin + piece_columns<T> < columns ? begin + piece_columns<T> : columns;
    // Eight elements a thread, if their bits are wanted: a byte.
    if (mask == nullptr) {
#pragma unroll 1
        for (int64_t i = begin + threadIdx.x; i < end; i += threads)
            to[i] = from_float<T>(read_back<symmetric>(rounded<symmetric>(to_float(from[i]), work), work, quant));
        return;
    }
#pragma unroll 1
    for (int64_t i = begin + 8 * threadIdx.x; i < end; i += 8 * threads) {
        unsigned bits = 0;
#pragma unroll 1
        for (int j = 0; j < 8 && i + j < end; j++) {
            const float q = rounded<symmetric>(to_float(from[i + j]), work);
            to[i + j] = from_float<T>(read_back<symmetric>(q, work, quant));
            if (is_unclipped(q, quant)) bits |= 1u << j;
        }
        mask[(row * columns + i) / 8] = static_cast<uint8_t>(bits);
    }
}

/// Many short rows of whole vectors and of whole bytes of bits, with a given range each: the vectors of the matrix one
/// after another.
template <class T, bool symmetric>
__global__ void __launch_bounds__(threads)
    quantize_short_rows_kernel(const T* __restrict__ x, T* __restrict__ y, unsigned vectors, unsigned vectors_per_row,
                               const float* __restrict__ scale, const float* __restrict__ offset, QuantRange quant,
                               uint8_t* __restrict__ mask) {
    constexpr int width = Vector<T>::count;
    const unsigned begin = blockIdx.x * (threads * unroll) + threadIdx.x;
    Vector<T> held[unroll];
#pragma unroll
    for (int u = 0; u < unroll; u++)
        if (begin + u * threads < vectors) held[u] = load_vector(x + static_cast<int64_t>(begin + u * threads) * width);
#pragma unroll
    for (int u = 0; u < unroll; u++) {
        const unsigned i = begin + u * threads;
        unsigned bits = 0;
        if (i < vectors) {
            const unsigned row = i / vectors_per_row;
            const Working work = working<T>({scale[row], symmetric ? 0.0f : offset[row]});
            bits = quantize_vector<symmetric>(held[u], work, quant, mask != nullptr);
            store_vector(y + static_cast<int64_t>(i) * width, held[u]);
        }
        if (mask != nullptr) store_mask<width>(mask, i, i < vectors, bits);
    }
}

/// A thread makes one byte of the kept bits of any rows.
template <class T, bool symmetric>
__global__ void __launch_bounds__(threads, 4)  // 64 registers: with fewer, ptxas spills
    mask_bits_kernel(const T* __restrict__ x, int64_t rows, int64_t columns, const float* __restrict__ scale,
                     const float* __restrict__ offset, QuantRange quant, uint8_t* __restrict__ mask) {
    const int64_t count = rows * columns;
    for (int64_t byte = first_item(); byte * 8 < count; byte += stride()) {
        unsigned bits = 0;
        int64_t row = byte * 8 / columns, column = byte * 8 % columns;
        for (int j = 0; j < 8 && byte * 8 + j < count; j++) {
            const Working work = working<T>({scale[row], symmetric ? 0.0f : offset[row]});
            if (is_unclipped(rounded<symmetric>(to_float(x[byte * 8 + j]), work), quant)) bits |= 1u << j;
            if (++column == columns) {
                column = 0;
                row++;
            }
        }
        mask[byte] = static_cast<uint8_t>(bits);
    }
}

}  // namespace ds_compress::elementwise
