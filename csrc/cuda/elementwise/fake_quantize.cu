#include "fake_quantize.cuh"

#include "../dtypes.cuh"
#include "launchers.h"

namespace ds_compress::elementwise {

template <class T, bool symmetric>
struct FakeQuantize {
    const T* x;
    T* y;
    int64_t rows, columns;
    float* scale;
    float* offset;
    QuantRange quant;
    math::Divisor steps;
    cudaStream_t stream;

    /// `given`: whether there are ranges; else they are measured.
    cudaError_t run(bool given, uint8_t* mask) const {
        if (columns == 0 && given) return cudaSuccess;
        const bool bits_fit = columns % 8 == 0 || rows == 1;  // rows are whole bytes of them
        const cudaError_t error =
            given ? by_given_ranges(bits_fit ? mask : nullptr) : measured(bits_fit ? mask : nullptr);
        const bool is_done = mask == nullptr || columns == 0 || (bits_fit && !(is_loose() && !given));
        if (error != cudaSuccess || is_done) return error;
        return launch(mask_bits_kernel<T, symmetric>, blocks_for((rows * columns + 7) / 8), threads, 0, stream, x, rows,
                      columns, scale, offset, quant, mask);
    }

private:
    static constexpr int64_t width = Vector<T>::count;

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
        return launch(quantize_short_rows_kernel<T, symmetric>, blocks_for(vectors, threads * unroll, 0), threads, 0,
                      stream, x, y, static_cast<unsigned>(vectors), static_cast<unsigned>(columns / width), scale,
                      offset, quant, mask);
    }

    template <int sharing, int depth>
    cudaError_t in_rows(uint8_t* mask) const {
        return launch(fake_quantize_rows_kernel<T, sharing, depth, symmetric>,
                      blocks_for(rows, threads_for<sharing> / sharing, 0), threads_for<sharing>, 0, stream, x, y, rows,
                      static_cast<int>(columns), scale, offset, quant, steps, mask);
    }

    cudaError_t in_loose_rows() const {
        return launch(fake_quantize_loose_rows_kernel<T, symmetric>, blocks_for(rows, warps, 0), threads, 0, stream, x,
                      y, rows, columns, scale, offset, quant, steps);
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
            error = launch(finish_spans_kernel<symmetric>, blocks_for(rows), threads, 0, stream, rows, columns, scale,
                           offset, steps);
        return error;
    }

    int64_t pieces_per_row() const { return (columns + piece_columns<T> - 1) / piece_columns<T>; }

    template <bool measured>
    cudaError_t in_pieces(uint8_t* mask) const {
        if (rows * pieces_per_row() > INT32_MAX) return cudaErrorInvalidValue;
        return launch(quantize_pieces_kernel<T, symmetric, measured>,
                      dim3(static_cast<unsigned>(rows * pieces_per_row())), threads, 0, stream, x, y, rows, columns,
                      static_cast<unsigned>(pieces_per_row()), scale, offset, quant, mask);
    }
};

template <class T>
static cudaError_t fake_quantize(const void* x, void* y, int64_t rows, int64_t columns, bool given, float* scale,
                                 float* offset, QuantRange quant, uint8_t* mask, cudaStream_t stream) {
    const T* const from = static_cast<const T*>(x);
    T* const to = static_cast<T*>(y);
    const math::Divisor steps = math::divisor_of(quant.steps);
    if (offset == nullptr)
        return FakeQuantize<T, true>{from, to, rows, columns, scale, offset, quant, steps, stream}.run(given, mask);
    return FakeQuantize<T, false>{from, to, rows, columns, scale, offset, quant, steps, stream}.run(given, mask);
}

}  // namespace ds_compress::elementwise

extern "C" cudaError_t dsc_fake_quantize(const void* x, void* y, int dtype, int64_t rows, int64_t columns, int given,
                                         int64_t ranges, float* scale, float* offset, int quant_min, int quant_max,
                                         int steps, uint8_t* mask, cudaStream_t stream) {
    using namespace ds_compress;
    using namespace ds_compress::elementwise;
    if (rows < 0 || rows > INT32_MAX || columns < 0) return cudaErrorInvalidValue;
    if (ranges == 1) {  // one range for all: one row
        columns *= rows;
        rows = 1;
    }
    const QuantRange quant = {static_cast<float>(quant_min), static_cast<float>(quant_max), static_cast<float>(steps)};
    return with_dtype(dtype, [&](auto t) {
        return fake_quantize<decltype(t)>(x, y, rows, columns, given != 0, scale, offset, quant, mask, stream);
    });
}
