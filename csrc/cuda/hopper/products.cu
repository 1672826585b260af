#include "products.h"

namespace ds_compress::hopper {

// 64 x 64, 64 x 128 and 128 x 128 outputs. Of 128 x 256 none was faster on an H200.
enum Tile { small = 0, middle, large };

static cudaError_t int8_product(const DscProduct& product, int tile, cudaStream_t stream) {
    if (product.out_dtype == dsc_float32)
        return tile == small ? int8_64x64_32(product, stream) : int8_128x128_32(product, stream);
    switch (tile) {
        case small:
            return int8_64x64_16(product, stream);
        case middle:
            return int8_64x128_16(product, stream);
        default:
            return int8_128x128_16(product, stream);
    }
}

/// Microseconds on an H200: what a launch takes, and for every wave of tiles over the multiprocessors what does and
/// what does not grow with k. Fitted to 117 products (BERT-base, Llamas of 1B and 8B; 32 to 8192 rows;
/// benchmarks/results/gpu), within 12 to 17 % each; the tile that it chooses takes 1.7 % longer than the best one.
struct Cost {
    int rows, columns;
    double launch, wave, wave_and_column;

    double of(int64_t m, int64_t n, int64_t k, int multiprocessors) const {
        const double tiles =
            static_cast<double>((m + rows - 1) / rows) * static_cast<double>((n + columns - 1) / columns);
        const double part = tiles / multiprocessors;
        // Few waves end together; of many, the last ones overlap.
        const double waves = part < 8 ? static_cast<double>(static_cast<int64_t>(part + 0.999999)) : part + 0.5;
        return launch + waves * (wave + wave_and_column * static_cast<double>(k));
    }
};
static constexpr Cost costs[dsc_hopper_tiles] = {
    {64, 64, 3.26, 0.419, 1.50e-3}, {64, 128, 3.91, 0.949, 1.69e-3}, {128, 128, 6.50, 1.59, 2.57e-3}};

}  // namespace ds_compress::hopper

extern "C" cudaError_t dsc_hopper_product(const DscProduct* product, int tile, cudaStream_t stream) {
    using namespace ds_compress::hopper;
    if (tile < 0 || tile >= dsc_hopper_tiles) return cudaErrorInvalidValue;
    return int8_product(*product, tile, stream);
}

extern "C" int dsc_hopper_tile(int64_t m, int64_t n, int64_t k, int multiprocessors) {
    using namespace ds_compress::hopper;
    if (m <= 64) return small;
    const int most = m <= 128 ? middle : large;
    int best = small;
    for (int tile = middle; tile <= most; tile++)
        if (costs[tile].of(m, n, k, multiprocessors) < costs[best].of(m, n, k, multiprocessors)) best = tile;
    return best;
}
