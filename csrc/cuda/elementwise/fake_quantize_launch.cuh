// Which of the kernels of fake quantization go over a matrix, whatever it is quantized to.
#pragma once

#include "fake_quantize.cuh"
#include "small_blocks.cuh"

namespace ds_compress::elementwise {

/// One call, on rows: blocks of a matrix are the rows of another.
template <class T, class Quantizer>
struct FakeQuantize {
    const T* x;
    T* y;
    int64_t rows, columns;
    float* scale;
    float* offset;
    Quantizer quantizer;
    cudaStream_t stream;

    /// `given`: whether there are ranges; else they are measured.
    cudaError_t run(bool given, uint8_t* mask) const {
        if (columns == 0 && given) return cudaSuccess;
        const bool bits_fit = columns % 8 == 0 || rows == 1;  // rows are whole bytes of them
        const cudaError_t error =
            given ? by_given_ranges(bits_fit ? mask : nullptr) : measured(bits_fit ? mask : nullptr);
        const bool is_done = mask == nullptr || columns == 0 || (bits_fit && !(is_loose() && !given));
        if (error != cudaSuccess || is_done) return error;
        return launch(mask_bits_kernel<T, Quantizer>, blocks_for((rows * columns + 7) / 8), threads, 0, stream, x, rows,
                      columns, scale, offset, quantizer, mask);
    }

private:
    static constexpr int64_t width = Vector<T>::count;
    static constexpr bool symmetric = Quantizer::symmetric;

    bool is_whole() const {
        const auto address = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y);
        return columns % 8 == 0 && address % 16 == 0;
    }
    /// Not even long enough for pieces of its own.
    bool is_loose() const { return !is_whole() && columns <= 16384; }

    cudaError_t measured(uint8_t* mask) const {
        const int64_t vectors = columns / width;
        if (is_loose()) return in_loose_rows();
        if (!is_whole() || vectors > 4096) {
            const cudaError_t error = measure_pieces();
            return error == cudaSuccess ? in_pieces<true>(mask) : error;
        }
        if constexpr (Quantizer::has_small_blocks)
            if (vectors <= 32 && (vectors & (vectors - 1)) == 0 && rows * vectors <= INT32_MAX)
                return in_small_blocks(mask);
        if (vectors <= 32) return in_rows<8, 4>(mask);
        if (vectors <= 128) return in_rows<32, 4>(mask);
        if (vectors <= 256) return in_rows<32, 8>(mask);
        if (vectors <= 512) return in_rows<128, 4>(mask);
        if (vectors <= 1024) return in_rows<256, 4>(mask);
        if (vectors <= 2048) return in_rows<256, 8>(mask);
        return in_rows<512, 8>(mask);
    }

    cudaError_t by_given_ranges(uint8_t* mask) const {
        const int64_t vectors = rows * (columns / width);
        if (rows == 1 || !is_whole() || columns >= piece_columns<T> || vectors > INT32_MAX)
            return in_pieces<false>(mask);
        return launch(quantize_short_rows_kernel<T, Quantizer>, blocks_for(vectors, threads * unroll, 0), threads, 0,
                      stream, x, y, static_cast<unsigned>(vectors), static_cast<unsigned>(columns / width), scale,
                      offset, quantizer, mask);
    }

    template <int sharing, int depth>
    cudaError_t in_rows(uint8_t* mask) const {
        return launch(fake_quantize_rows_kernel<T, sharing, depth, Quantizer>,
                      blocks_for(rows, threads_for<sharing> / sharing, 0), threads_for<sharing>, 0, stream, x, y, rows,
                      static_cast<int>(columns), scale, offset, quantizer, mask);
    }

    cudaError_t in_small_blocks(uint8_t* mask) const {
        const int64_t vectors = rows * (columns / width);
        return launch(fake_quantize_small_blocks_kernel<T, Quantizer>, blocks_for(vectors, threads * unroll, 0),
                      threads, 0, stream, x, y, static_cast<unsigned>(vectors), static_cast<int>(columns / width),
                      scale, quantizer, mask);
    }

    cudaError_t in_loose_rows() const {
        return launch(fake_quantize_loose_rows_kernel<T, Quantizer>, blocks_for(rows, warps, 0), threads, 0, stream, x,
                      y, rows, columns, scale, offset, quantizer);
    }

    cudaError_t measure_pieces() const {
        cudaError_t error =
            launch(begin_spans_kernel<symmetric>, blocks_for(rows), threads, 0, stream, rows, scale, offset);
        const int64_t each = 132 * 8 / rows + 1, pieces = pieces_per_row();
        const int64_t blocks_per_row = each < pieces ? each : pieces;
        if (error == cudaSuccess)
            error = launch(join_spans_kernel<T, symmetric>, dim3(static_cast<unsigned>(rows * blocks_per_row)), threads,
                           0, stream, x, rows, columns, static_cast<unsigned>(blocks_per_row), scale, offset);
        if (error == cudaSuccess)
            error = launch(finish_spans_kernel<Quantizer>, blocks_for(rows), threads, 0, stream, rows, columns, scale,
                           offset, quantizer);
        return error;
    }

    int64_t pieces_per_row() const { return (columns + piece_columns<T> - 1) / piece_columns<T>; }

    template <bool measured>
    cudaError_t in_pieces(uint8_t* mask) const {
        if (rows * pieces_per_row() > INT32_MAX) return cudaErrorInvalidValue;
        return launch(quantize_pieces_kernel<T, Quantizer, measured>,
                      dim3(static_cast<unsigned>(rows * pieces_per_row())), threads, 0, stream, x, y, rows, columns,
                      static_cast<unsigned>(pieces_per_row()), scale, offset, quantizer, mask);
    }
};

}  // namespace ds_compress::elementwise
