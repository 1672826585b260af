#include "products.h"

namespace ds_compress::hopper {

enum Tile { rows_64 = 0, rows_64_wide, rows_128, rows_128_wide };

static cudaError_t int8_product(const DscProduct& product, int tile, cudaStream_t stream) {
    if (product.out_dtype == dsc_float32)
        return tile == rows_64 ? int8_64x64_32(product, stream) : int8_128x128_32(product, stream);
    switch (tile) {
        case rows_64:
            return int8_64x64_16(product, stream);
        case rows_64_wide:
            return int8_64x128_16(product, stream);
        case rows_128:
            return int8_128x128_16(product, stream);
        default:
            return int8_128x256_16(product, stream);
    }
}

}  // namespace ds_compress::hopper

extern "C" cudaError_t dsc_hopper_product(const DscProduct* product, int codes, int tile, cudaStream_t stream) {
    using namespace ds_compress::hopper;
    if (codes != dsc_int8_codes || tile < 0 || tile >= dsc_hopper_tiles) return cudaErrorInvalidValue;
    return int8_product(*product, tile, stream);
}

extern "C" int dsc_hopper_tile(int64_t m, int64_t n, int64_t, int multiprocessors) {
    using namespace ds_compress::hopper;
    const auto tiles = [&](int64_t rows, int64_t columns) { return ((m + rows - 1) / rows) * ((n + columns - 1) / columns); };
    if (tiles(128, 256) >= multiprocessors) return rows_128_wide;
    if (tiles(128, 128) >= multiprocessors) return rows_128;
    if (tiles(64, 128) >= multiprocessors) return rows_64_wide;
    return rows_64;
}
