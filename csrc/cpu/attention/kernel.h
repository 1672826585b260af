// Attention for one width of vectors. To be included in a .cpp of one instruction set.
//
// The keys of a group lie transposed in scratch, the values beside them, both in fp32 and padded to whole vectors. A
// few queries at a time: their scores (a product in registers), softmax, and the product with the values. Sums of
// powers divide the result at the end, once for each query.
#pragma once

#include "../linear/epilogue.h"
#include "../linear/scratch.h"
#include "attention.h"

namespace ds_compress::cpu {
namespace {

constexpr int kQueries = kLanes == 16 ? 8 : 4;  // times kVectors sums, which registers hold beside their factors
constexpr int kVectors = 3;
constexpr float kLog2e = 1.44269504f;
constexpr float kLeastPower = -126.0f;  // below it a power of two counts as 0

struct AttentionScratch {
    int64_t keys, width;  // padded: of the keys, of a value
    float *keys_transposed, *values, *query, *scores, *result;
    int64_t bytes;

    AttentionScratch(void* memory, const AttentionCall& call)
        : keys(round_up(call.keys, kLanes)), width(round_up(call.value_width, kLanes)) {
        ScratchArrays arrays(memory);
        keys_transposed = arrays.take<float>(call.width * keys);
        values = arrays.take<float>(call.keys * width);
        query = arrays.take<float>(kQueries * call.width);
        scores = arrays.take<float>(kQueries * keys);
        result = arrays.take<float>(kQueries * width);
        bytes = arrays.bytes();
    }
};

// to (kRows, columns) = from (kRows, depth) times by (depth, columns): kCount vectors of columns. Rows of each lie
// their stride apart.
template <int kRows, int kCount>
DSC_INLINE void product(const float* from, int64_t from_stride, const float* by, int64_t stride, int64_t depth,
                        float* to, int64_t to_stride) {
    Floats sums[kRows][kCount] = {};
    for (int64_t k = 0; k < depth; k++, by += stride) {
        Floats factors[kCount];
#pragma GCC unroll 3
        for (int j = 0; j < kCount; j++) factors[j] = load_as<Floats>(by + j * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) {
            const Floats factor = splat(from[r * from_stride + k]);
#pragma GCC unroll 3
            for (int j = 0; j < kCount; j++) sums[r][j] = multiply_add(factor, factors[j], sums[r][j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 3
        for (int j = 0; j < kCount; j++) store(to + r * to_stride + j * kLanes, sums[r][j]);
}

template <int kRows>
[[gnu::noinline]] void products(const float* from, int64_t from_stride, const float* by, int64_t stride, int64_t depth,
                                int64_t columns, float* to, int64_t to_stride) {
    int64_t j = 0;
    for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes)
        product<kRows, kVectors>(from, from_stride, by + j, stride, depth, to + j, to_stride);
    if (j + 2 * kLanes <= columns) {
        product<kRows, 2>(from, from_stride, by + j, stride, depth, to + j, to_stride);
        j += 2 * kLanes;
    }
    if (j < columns) product<kRows, 1>(from, from_stride, by + j, stride, depth, to + j, to_stride);
}

// Few rows of the last queries are not worth code of their own: one at a time.
void multiply(int64_t rows, const float* from, int64_t from_stride, const float* by, int64_t stride, int64_t depth,
              int64_t columns, float* to, int64_t to_stride) {
    if (rows == kQueries) return products<kQueries>(from, from_stride, by, stride, depth, columns, to, to_stride);
    for (int64_t r = 0; r < rows; r++)
        products<1>(from + r * from_stride, from_stride, by, stride, depth, columns, to + r * to_stride, to_stride);
}

// Where each lane of a shuffle comes from; as constants, for gcc builds an index that it computes lane by lane.
struct Lanes {
    alignas(64) int32_t from[kLanes];
};
template <class From>
constexpr Lanes lanes(const From& from) {
    Lanes found{};
    for (int i = 0; i < kLanes; i++) found.from[i] = from(i);
    return found;
}
constexpr int kHalvings = __builtin_ctz(kLanes);
struct Shuffles {
    Lanes by_half[kHalvings];
};
// from(i, half) for half = 1, 2, 4, ...
template <class From>
constexpr Shuffles shuffles(const From& from) {
    Shuffles found{};
    for (int n = 0; n < kHalvings; n++) found.by_half[n] = lanes([&](int i) { return from(i, 1 << n); });
    return found;
}
constexpr Lanes kLane = lanes([](int i) { return i; });
constexpr Shuffles kRotated = shuffles([](int i, int half) { return (i + half) % kLanes; });
// Of two rows of a square, above and below: what swapping off-diagonal halves leaves in each.
constexpr Shuffles kAbove = shuffles([](int i, int half) { return i & half ? kLanes + i - half : i; });
constexpr Shuffles kBelow = shuffles([](int i, int half) { return i & half ? kLanes + i : i + half; });

// All lanes joined by `join`, by halves.
template <class Join>
DSC_INLINE float over_lanes(Floats value, const Join& join) {
#pragma GCC unroll 4
    for (int n = 0; n < kHalvings; n++)
        value = join(value, __builtin_shuffle(value, load_as<Ints>(kRotated.by_half[n].from)));
    return value[0];
}

// The first `count` lanes from memory, which may end there; the others are 0. count: up to all lanes, or more.
DSC_INLINE Floats load_first(const float* from, int64_t count) {
    if (count >= kLanes) return load_as<Floats>(from);
#if defined(DSC_AVX512)
    return _mm512_maskz_loadu_ps((1u << count) - 1, from);
#else
    Floats found{};
    for (int64_t i = 0; i < count; i++) found[i] = from[i];
    return found;
#endif
}

DSC_INLINE Ints load_first(const bool* from, int64_t count) {
#if defined(DSC_AVX512)
    const __mmask16 lanes = count >= kLanes ? 0xffff : (1u << count) - 1;
    return (Ints)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, from));
#else
    Ints found{};
    for (int64_t i = 0; i < count && i < kLanes; i++) found[i] = from[i];
    return found;
#endif
}

DSC_INLINE Floats kept(Ints is_kept, Floats score) { return is_kept ? score : splat(-__builtin_inff()); }

// `count` scores of a query become e^(score - the largest), in place, and what lies behind them 0; returns their sum.
// bias, allowed: of the query, or null.
DSC_INLINE float powers_of_scores(float* scores, int64_t count, int64_t padded, const float* bias,
                                  const bool* allowed) {
    const Ints lane = load_as<Ints>(kLane.from);
    Floats most = splat(-__builtin_inff());
    for (int64_t i = 0; i < padded; i += kLanes) {
        const int64_t left = count > i ? count - i : 0;
        Floats score = load_as<Floats>(scores + i);
        if (bias != nullptr) score += load_first(bias + i, left);
        if (allowed != nullptr) score = kept(load_first(allowed + i, left) != 0, score);
        if (left < kLanes) score = kept(lane < static_cast<int32_t>(left), score);
        store(scores + i, score);
        most = larger(score, most);
    }
    float largest = over_lanes(most, [](Floats a, Floats b) { return larger(a, b); });
    if (largest == -__builtin_inff()) largest = 0.0f;  // no score counts
    Floats sums{};
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Floats power = (load_as<Floats>(scores + i) - largest) * kLog2e;
        const Floats bounded = larger(splat(kLeastPower), power);  // NaN stays NaN
        // A NaN times 0 is one, which the bits of `power_of_2` may not be.
        const Floats found = multiply_add(bounded, Floats{}, power_of_2(bounded));
        const Floats value = floats_of(bits_of(found) & ~(Ints)(power < kLeastPower));
        store(scores + i, value);
        sums += value;
    }
    return over_lanes(sums, [](Floats a, Floats b) { return a + b; });
}

template <class Format>
DSC_INLINE void save_row(const float* result, int64_t count, float share, typename Format::Stored* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) Format::save(to + i, load_as<Floats>(result + i) * share);
    if (i == count) return;
    typename Format::Stored whole[kLanes];
    Format::save(whole, load_as<Floats>(result + i) * share);
    memcpy(to + i, whole, (count - i) * sizeof(*to));
}

template <class Format>
void attend(const AttentionCall& call, int64_t batch, int64_t head, const AttentionScratch& scratch) {
    using Stored = typename Format::Stored;
    const auto* query =
        static_cast<const Stored*>(call.query) + batch * call.query_strides.batch + head * call.query_strides.head;
    auto* y = static_cast<Stored*>(call.y) + (batch * call.queries * call.heads + head) * call.value_width;
    const int64_t mask = batch * call.mask_strides.batch + head * call.mask_strides.head;
    for (int64_t begin = 0; begin < call.queries; begin += kQueries) {
        const int64_t rows = call.queries - begin < kQueries ? call.queries - begin : kQueries;
        // Keys that the last of these queries sees.
        const int64_t seen = call.is_causal && begin + rows < call.keys ? begin + rows : call.keys;
        const int64_t padded = round_up(seen, kLanes);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < call.width; i++)
                scratch.query[r * call.width + i] =
                    Format::widen(query[(begin + r) * call.query_strides.token + i]) * call.scale;
        multiply(rows, scratch.query, call.width, scratch.keys_transposed, scratch.keys, call.width, padded,
                 scratch.scores, scratch.keys);
        float sums[kQueries];
        for (int64_t r = 0; r < rows; r++) {
            float* scores = scratch.scores + r * scratch.keys;
            const int64_t count = call.is_causal && begin + r + 1 < seen ? begin + r + 1 : seen;
            const int64_t masked = mask + (begin + r) * call.mask_strides.token;
            sums[r] = powers_of_scores(scores, count, padded, call.bias == nullptr ? nullptr : call.bias + masked,
                                       call.allowed == nullptr ? nullptr : call.allowed + masked);
        }
        multiply(rows, scratch.scores, scratch.keys, scratch.values, scratch.width, seen, scratch.width, scratch.result,
                 scratch.width);
        for (int64_t r = 0; r < rows; r++) {
            // Where no score counts there is nothing to attend to: 0, as in torch.
            const float share = sums[r] == 0.0f ? 0.0f : 1.0f / sums[r];
            save_row<Format>(scratch.result + r * scratch.width, call.value_width, share,
                             y + (begin + r) * call.heads * call.value_width);
        }
    }
}

// Rows become columns, by swapping the off-diagonal halves of ever larger squares.
DSC_INLINE void transpose(Floats (&rows)[kLanes]) {
#pragma GCC unroll 4
    for (int n = 0; n < kHalvings; n++) {
        const int half = 1 << n;
        const Ints to_above = load_as<Ints>(kAbove.by_half[n].from), to_below = load_as<Ints>(kBelow.by_half[n].from);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) {
            if (i & half) continue;
            const Floats above = rows[i], below = rows[i + half];
            rows[i] = __builtin_shuffle(above, below, to_above);
            rows[i + half] = __builtin_shuffle(above, below, to_below);
        }
    }
}

// to (width, keys padded with zeros) = from (keys, width), whose rows are `stride` apart.
template <class Format>
void transpose_keys(const typename Format::Stored* from, int64_t stride, int64_t keys, int64_t width, float* to) {
    const int64_t padded = round_up(keys, kLanes);
    for (int64_t i = 0; i < padded; i += kLanes) {
        const int64_t count = keys - i < kLanes ? keys - i : kLanes;
        int64_t j = 0;
        for (; j + kLanes <= width; j += kLanes) {
            Floats rows[kLanes];
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; r++) rows[r] = r < count ? Format::load(from + (i + r) * stride + j) : Floats{};
            transpose(rows);
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; r++) store(to + (j + r) * padded + i, rows[r]);
        }
        for (; j < width; j++)
            for (int64_t r = 0; r < kLanes; r++)
                to[j * padded + i + r] = r < count ? Format::widen(from[(i + r) * stride + j]) : 0.0f;
    }
}

template <class Format>
void attend_group(const AttentionCall& call, int64_t batch, int64_t group, void* memory) {
    using Stored = typename Format::Stored;
    const AttentionScratch scratch(memory, call);
    const auto* key =
        static_cast<const Stored*>(call.key) + batch * call.key_strides.batch + group * call.key_strides.head;
    const auto* value =
        static_cast<const Stored*>(call.value) + batch * call.value_strides.batch + group * call.value_strides.head;
    transpose_keys<Format>(key, call.key_strides.token, call.keys, call.width, scratch.keys_transposed);
    for (int64_t i = 0; i < call.keys; i++)
        for (int64_t j = 0; j < call.value_width; j++)
            scratch.values[i * scratch.width + j] = Format::widen(value[i * call.value_strides.token + j]);
    const int64_t heads = call.heads / call.groups;
    for (int64_t head = group * heads; head < (group + 1) * heads; head++) attend<Format>(call, batch, head, scratch);
}

constexpr AttentionKernel kAttention{
    .run =
        [](const AttentionCall& call, int64_t batch, int64_t group, void* scratch) {
            with_format(call.type, [&]<class Format>() { attend_group<Format>(call, batch, group, scratch); });
        },
    .scratch_bytes = [](const AttentionCall& call) { return AttentionScratch(nullptr, call).bytes; },
};

}  // namespace
}  // namespace ds_compress::cpu
