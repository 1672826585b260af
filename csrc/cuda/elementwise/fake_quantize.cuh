// Fake quantization of the rows of a matrix, to what a `Quantizer` makes of them: see quant_range.cuh. A row that fits
// into the registers of some lanes, a warp or a block is read once. The pieces of longer rows are measured by many
// blocks, which meet in the row's scale and offset, and then read again. Rows that do not lie on vectors of 16 bytes go
// the loose way, element by element.
#pragma once

#include "span.cuh"

namespace ds_compress::elementwise {

// --- rows in registers ---------------------------------------------------------------------------------------------

template <int sharing>
constexpr int threads_for = sharing > 32 ? sharing : threads;

/// Measures and quantizes rows of whole vectors, each by `sharing` threads with `depth` vectors in registers: lanes of
/// a warp, or a block. kept: null, or for rows of whole bytes of it.
template <class T, int sharing, int depth, class Quantizer>
__global__ void __launch_bounds__(threads_for<sharing>, 1)
    fake_quantize_rows_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t rows, int columns,
                              float* __restrict__ scale, float* __restrict__ offset, Quantizer quantizer,
                              uint8_t* __restrict__ mask) {
    constexpr bool symmetric = Quantizer::symmetric;
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
    const math::ScaleAndOffset range = quantizer.range(join<sharing>(span), columns);
    if (member == 0 && row < rows) {
        scale[row] = range.scale;
        if (!symmetric) offset[row] = range.offset;
    }
    const auto work = quantizer.template working<T>(range);
#pragma unroll
    for (int d = 0; d < depth; d++) {
        const int i = d * sharing + member;
        unsigned bits = 0;
        if (i < vectors) {
            bits = quantizer.quantize_measured(held[d], work, mask != nullptr);
            store_vector(to + d * sharing * width, held[d]);
        }
        if (mask != nullptr) store_mask<width>(mask, row * (columns / width) + i, i < vectors, bits);
    }
}

// --- rows that are not whole vectors: a warp each, element by element ----------------------------------------------

template <class T, class Quantizer>
__global__ void __launch_bounds__(threads)
    fake_quantize_loose_rows_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t rows, int64_t columns,
                                    float* __restrict__ scale, float* __restrict__ offset, Quantizer quantizer) {
    constexpr bool symmetric = Quantizer::symmetric;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32;
    if (row >= rows) return;  // whole warps
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const T* const from = x + row * columns;
    Span<symmetric> span;
    for (int64_t i = lane; i < columns; i += 32) span.add(to_float(from[i]));
    const math::ScaleAndOffset range = quantizer.range(join_warp<32>(span), columns);
    if (lane == 0) {
        scale[row] = range.scale;
        if (!symmetric) offset[row] = range.offset;
    }
    const auto work = quantizer.template working<T>(range);
    for (int64_t i = lane; i < columns; i += 32)
        y[row * columns + i] = from_float<T>(quantizer.quantize_one(to_float(from[i]), work).value);
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

template <class Quantizer>
__global__ void __launch_bounds__(threads)
    finish_spans_kernel(int64_t rows, int64_t columns, float* scale, float* offset, Quantizer quantizer) {
    constexpr bool symmetric = Quantizer::symmetric;
    for (int64_t row = first_item(); row < rows; row += stride()) {
        Span<symmetric> span;
        if constexpr (symmetric) {
            span = {scale[row]};
        } else {
            span = {unordered(reinterpret_cast<int*>(offset)[row]), unordered(reinterpret_cast<int*>(scale)[row])};
        }
        const math::ScaleAndOffset range = quantizer.range(span, columns);
        scale[row] = range.scale;
        if (!symmetric) offset[row] = range.offset;
    }
}

/// With ranges that are known, one for each row. `measured`: they were measured just now, so that the last pieces,
/// which come first, may still be in the cache.
template <class T, class Quantizer, bool measured>
__global__ void __launch_bounds__(threads, 4)  // with the registers that ptxas chooses it spills
    quantize_pieces_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t rows, int64_t columns,
                           unsigned pieces_per_row, const float* __restrict__ scale, const float* __restrict__ offset,
                           Quantizer quantizer, uint8_t* __restrict__ mask) {
    constexpr bool symmetric = Quantizer::symmetric;
    constexpr int width = Vector<T>::count;
    const unsigned piece = measured ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int64_t row = piece / pieces_per_row, begin = piece % pieces_per_row * piece_columns<T>;
    const T* const from = x + row * columns;
    T* const to = y + row * columns;
    const auto work = quantizer.template working<T>({scale[row], symmetric ? 0.0f : offset[row]});
    if (has_whole_vectors<T>(x, y, rows, columns) && begin + piece_columns<T> <= columns) {
        Vector<T> held[piece_vectors];
#pragma unroll
        for (int u = 0; u < piece_vectors; u++)
            held[u] = load_vector(from + begin + (u * threads + static_cast<int>(threadIdx.x)) * width);
#pragma unroll
        for (int u = 0; u < piece_vectors; u++) {
            const int i = u * threads + static_cast<int>(threadIdx.x);
            const unsigned bits = measured ? quantizer.quantize_measured(held[u], work, mask != nullptr)
                                           : quantizer.quantize(held[u], work, mask != nullptr);
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
            to[i] = from_float<T>(quantizer.quantize_one(to_float(from[i]), work).value);
        return;
    }
#pragma unroll 1
    for (int64_t i = begin + 8 * threadIdx.x; i < end; i += 8 * threads) {
        unsigned bits = 0;
#pragma unroll 1
        for (int j = 0; j < 8 && i + j < end; j++) {
            const Quantized one = quantizer.quantize_one(to_float(from[i + j]), work);
            to[i + j] = from_float<T>(one.value);
            if (one.is_inside) bits |= 1u << j;
        }
        mask[(row * columns + i) / 8] = static_cast<uint8_t>(bits);
    }
}

/// Many short rows of whole vectors and of whole bytes of bits, with a given range each: the vectors of the matrix one
/// after another.
template <class T, class Quantizer>
__global__ void __launch_bounds__(threads)
    quantize_short_rows_kernel(const T* __restrict__ x, T* __restrict__ y, unsigned vectors, unsigned vectors_per_row,
                               const float* __restrict__ scale, const float* __restrict__ offset, Quantizer quantizer,
                               uint8_t* __restrict__ mask) {
    constexpr bool symmetric = Quantizer::symmetric;
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
            const auto work = quantizer.template working<T>({scale[row], symmetric ? 0.0f : offset[row]});
            bits = quantizer.quantize(held[u], work, mask != nullptr);
            store_vector(y + static_cast<int64_t>(i) * width, held[u]);
        }
        if (mask != nullptr) store_mask<width>(mask, i, i < vectors, bits);
    }
}

/// A thread makes one byte of the kept bits of any rows.
template <class T, class Quantizer>
__global__ void __launch_bounds__(threads, 4)  // 64 registers: with fewer, ptxas spills
    mask_bits_kernel(const T* __restrict__ x, int64_t rows, int64_t columns, const float* __restrict__ scale,
                     const float* __restrict__ offset, Quantizer quantizer, uint8_t* __restrict__ mask) {
    constexpr bool symmetric = Quantizer::symmetric;
    const int64_t count = rows * columns;
    for (int64_t byte = first_item(); byte * 8 < count; byte += stride()) {
        unsigned bits = 0;
        int64_t row = byte * 8 / columns, column = byte * 8 % columns;
        for (int j = 0; j < 8 && byte * 8 + j < count; j++) {
            const auto work = quantizer.template working<T>({scale[row], symmetric ? 0.0f : offset[row]});
            if (quantizer.quantize_one(to_float(x[byte * 8 + j]), work).is_inside) bits |= 1u << j;
            if (++column == columns) {
                column = 0;
                row++;
            }
        }
        mask[byte] = static_cast<uint8_t>(bits);
    }
}

}  // namespace ds_compress::elementwise
