#include "fake_quantize.cuh"

#include "launchers.h"

namespace ds_compress::elementwise {

constexpr int64_t short_row = 1024;  // a warp each
constexpr int64_t long_row = 16384;  // several blocks each
constexpr int64_t piece_columns = 8192;

template <class T, bool symmetric>
struct FakeQuantize {
    const T* x;
    T* y;
    int64_t rows, columns;
    float* scale;
    float* offset;
    Codes codes;
    cudaStream_t stream;

    cudaError_t run(bool given, uint8_t* kept) const {
        const cudaError_t error = given ? in_pieces() : measured();
        if (error != cudaSuccess || kept == nullptr || columns == 0) return error;
        return launch(kept_bits_kernel<T, symmetric>, blocks_for((rows * columns + 7) / 8), threads, 0, stream, x, rows,
                      columns, scale, offset, codes, kept);
    }

private:
    cudaError_t measured() const {
        if (columns <= short_row) return in_rows<32>();
        if (columns <= long_row) return in_rows<threads>();
        cudaError_t error = launch(begin_spans_kernel<symmetric>, blocks_for(rows), threads, 0, stream, rows, scale, offset);
        if (error == cudaSuccess)
            error = launch(join_spans_kernel<T, symmetric>, grid(), threads, 0, stream, x, columns, piece_columns,
                           pieces_per_row(), scale, offset);
        if (error == cudaSuccess)
            error = launch(finish_spans_kernel<symmetric>, blocks_for(rows), threads, 0, stream, rows, columns, scale,
                           offset, codes.steps);
        return error == cudaSuccess ? in_pieces() : error;
    }

    template <int sharing>
    cudaError_t in_rows() const {
        constexpr int rows_per_block = threads / sharing;
        const dim3 grid(static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block));
        return launch(fake_quantize_rows_kernel<T, sharing, symmetric>, grid, threads, 0, stream, x, y, rows, columns, scale,
                      offset, codes);
    }

    unsigned pieces_per_row() const { return static_cast<unsigned>((columns + piece_columns - 1) / piece_columns); }
    dim3 grid() const { return dim3(static_cast<unsigned>(rows * pieces_per_row())); }

    cudaError_t in_pieces() const {
        if (rows * pieces_per_row() > INT32_MAX) return cudaErrorInvalidValue;
        return launch(quantize_pieces_kernel<T, symmetric>, grid(), threads, 0, stream, x, y, columns, piece_columns,
                      pieces_per_row(), scale, offset, codes);
    }
};

template <class T>
static cudaError_t fake_quantize(const void* x, void* y, int64_t rows, int64_t columns, bool given, float* scale,
                                 float* offset, Codes codes, uint8_t* kept, cudaStream_t stream) {
    const T* const from = static_cast<const T*>(x);
    T* const to = static_cast<T*>(y);
    if (offset == nullptr)
        return FakeQuantize<T, true>{from, to, rows, columns, scale, offset, codes, stream}.run(given, kept);
    return FakeQuantize<T, false>{from, to, rows, columns, scale, offset, codes, stream}.run(given, kept);
}

}  // namespace ds_compress::elementwise

extern "C" cudaError_t dsc_fake_quantize(const void* x, void* y, int dtype, int64_t rows, int64_t columns, int given,
                                         int64_t ranges, float* scale, float* offset, int low, int high, int steps,
                                         uint8_t* kept, cudaStream_t stream) {
    using namespace ds_compress;
    using namespace ds_compress::elementwise;
    if (rows < 0 || rows > INT32_MAX || columns < 0) return cudaErrorInvalidValue;
    if (ranges == 1) {  // one range for all: one row
        columns *= rows;
        rows = 1;
    }
    const Codes codes = {static_cast<float>(low), static_cast<float>(high), static_cast<float>(steps)};
    switch (dtype) {
        case dsc_float32:
            return fake_quantize<float>(x, y, rows, columns, given != 0, scale, offset, codes, kept, stream);
        case dsc_bfloat16:
            return fake_quantize<__nv_bfloat16>(x, y, rows, columns, given != 0, scale, offset, codes, kept,
                                                stream);
        case dsc_float16:
            return fake_quantize<__half>(x, y, rows, columns, given != 0, scale, offset, codes, kept, stream);
        default:
            return cudaErrorInvalidValue;
    }
}
