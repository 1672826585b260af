// How elementwise kernels share out their work: a thread has several independent accesses of 16 bytes under way.
#pragma once

#include "ds_compress/device.h"
#include "ds_compress/division.h"
#include "ds_compress/math.h"

namespace ds_compress::elementwise {

constexpr int threads = 256;
constexpr int warps = threads / 32;
constexpr int unroll = 2;  // vectors that a thread has under way

/// Blocks for `items` threads' worth of work; kernels stride over what is beyond. `per_multiprocessor`: at most so many
/// (of the 132 of a Hopper), where beginning a block costs something; 0: as many as there is work for.
inline dim3 blocks_for(int64_t items, int64_t per_block = threads, int64_t per_multiprocessor = 0) {
    const int64_t most = per_multiprocessor > 0 ? 132 * per_multiprocessor : INT32_MAX;
    const int64_t blocks = (items + per_block - 1) / per_block;
    return dim3(static_cast<unsigned>(blocks < most ? blocks : most));
}

DSC_DEVICE int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
DSC_DEVICE int64_t stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

/// 16 bytes at once.
template <class T>
struct alignas(16) Vector {
    static constexpr int count = 16 / sizeof(T);
    T values[count];
};

template <class T>
DSC_DEVICE Vector<T> load_vector(const T* from) {
    const uint4 words = load_wide<uint4>(from);
    Vector<T> vector;
    memcpy(&vector, &words, sizeof words);
    return vector;
}

template <class T>
DSC_DEVICE void store_vector(T* to, const Vector<T>& vector) {
    uint4 words;
    memcpy(&words, &vector, sizeof words);
    store_wide(to, words);
}

/// Of data that is read once and not written.
template <class T>
DSC_DEVICE Vector<T> load_passing_vector(const T* from) {
    const uint4 words = load_passing<uint4>(from);
    Vector<T> vector;
    memcpy(&vector, &words, sizeof words);
    return vector;
}

template <class T>
DSC_DEVICE void store_passing_vector(T* to, const Vector<T>& vector) {
    uint4 words;
    memcpy(&words, &vector, sizeof words);
    store_passing(to, words);
}

/// The elements of a vector as fp32, and back.
template <class T>
DSC_DEVICE void unpack(const Vector<T>& vector, float (&values)[Vector<T>::count]) {
#pragma unroll
    for (int j = 0; j < Vector<T>::count; j++) values[j] = to_float(vector.values[j]);
}

template <class T>
DSC_DEVICE Vector<T> pack(const float (&values)[Vector<T>::count]) {
    Vector<T> vector;
    if constexpr (sizeof(T) == 2) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; w++) words[w] = pair_of(values[2 * w], values[2 * w + 1], T());
        memcpy(&vector, words, sizeof words);
    } else {
#pragma unroll
        for (int j = 0; j < Vector<T>::count; j++) vector.values[j] = from_float<T>(values[j]);
    }
    return vector;
}

DSC_DEVICE bool is_aligned(const void* pointer, int bytes = 16) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<unsigned>(bytes) == 0;
}

}  // namespace ds_compress::elementwise
