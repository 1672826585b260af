#include "verified.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda.h"
#include "ds_compress/cuda_device.h"
#include "ds_compress/packed.h"

namespace ds_compress::bindings {
namespace {

constexpr int most_devices = 64, most_ways = 16;
std::atomic<Verdict> verdicts[most_devices][most_ways];

// One product whose every output is a float that integers decide: no rounding hides a misplaced operand.
struct Trial {
    int64_t m, n = 152, k = 208, pitch = 208;
    std::vector<uint8_t> quantized, weight;  // int8
    std::vector<float> input_scale, weight_scale, bias, expected;

    explicit Trial(int64_t rows)
        : m(rows),
          quantized(rows * pitch),
          weight(n * pitch),
          input_scale(rows),
          weight_scale(n),
          bias(n),
          expected(rows * n) {
        uint32_t state = 12345;
        const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 8; };
        std::vector<int> a(quantized.size()), b(weight.size());
        const auto draw = [&](std::vector<int>& values, std::vector<uint8_t>& bytes) {
            for (size_t i = 0; i < values.size(); i++) {
                values[i] = static_cast<int>(next() % 255) - 127;
                bytes[i] = static_cast<uint8_t>(values[i]);
            }
        };
        draw(a, quantized);
        draw(b, weight);
        for (auto* part : {&input_scale, &weight_scale})
            for (float& value : *part) value = static_cast<float>(next() % 1000 + 1) / 4096.0f;
        for (float& value : bias) value = static_cast<float>(next() % 2001) - 1000.0f;
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) {
                int sum = 0;
                for (int64_t c = 0; c < k; c++) sum += a[i * pitch + c] * b[j * pitch + c];
                const volatile float scaled = static_cast<float>(sum) * (input_scale[i] * weight_scale[j]);
                expected[i * n + j] = scaled + bias[j];
            }
    }
};

uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
Tensor on_device(const Tensor& like, const std::vector<T>& values, int64_t ahead, cudaStream_t stream) {
    const int64_t bytes = static_cast<int64_t>(values.size() * sizeof(T));
    Tensor made = new_tensor(like, {ahead + bytes}, kByte);
    check_launch(cudaMemcpyAsync(static_cast<uint8_t*>(made.mutable_data_ptr()) + ahead, values.data(), bytes,
                                 cudaMemcpyHostToDevice, stream),
                 "verification");
    return made;
}

/// The same numbers for each of several experts.
template <class T>
std::vector<T> repeated(const std::vector<T>& values, int64_t times) {
    std::vector<T> all;
    for (int64_t i = 0; i < times; i++) all.insert(all.end(), values.begin(), values.end());
    return all;
}

/// The trial's rows belong to two experts with the same weights, between which lies one without rows and with none.
cudaError_t multiply_grouped(const Trial& trial, const Tensor& quantized, const Tensor& input_scale, const Tensor& out,
                             int dtype, const Tensor& like, cudaStream_t stream) {
    constexpr int64_t head = sizeof(PackedHeader), experts = 3;
    std::vector<uint8_t> packed(head);
    packed.insert(packed.end(), trial.weight.begin(), trial.weight.end());
    const int64_t bytes = static_cast<int64_t>(packed.size());
    std::vector<uint8_t> all = repeated(packed, experts);
    std::fill(all.begin() + bytes, all.begin() + 2 * bytes, uint8_t{99});
    const std::vector<int64_t> ends{trial.m / 3, trial.m / 3, trial.m};
    const Tensor weights = on_device(like, all, 0, stream), offsets = on_device(like, ends, 0, stream);
    const Tensor weight_scale = on_device(like, repeated(trial.weight_scale, experts), 0, stream);
    const Tensor bias = on_device(like, repeated(trial.bias, experts), 0, stream);
    return dsc_int8_grouped_linear(const_data<int8_t>(quantized), const_data<float>(input_scale),
                                   weights.const_data_ptr(), bytes, const_data<float>(weight_scale),
                                   const_data<float>(bias), offsets.const_data_ptr(), 1, experts,
                                   out.mutable_data_ptr(), dtype, trial.m, trial.n, trial.k, stream);
}

bool try_out(const Way& way, int64_t rows, int dtype, const Tensor& like, cudaStream_t stream) {
    const Trial trial(rows);
    constexpr int64_t head = sizeof(PackedHeader);
    const Tensor quantized = on_device(like, trial.quantized, 0, stream),
                 packed = on_device(like, trial.weight, head, stream);
    const Tensor input_scale = on_device(like, trial.input_scale, 0, stream);
    const Tensor weight_scale = on_device(like, trial.weight_scale, 0, stream);
    const Tensor bias = on_device(like, trial.bias, 0, stream);
    const int64_t count = trial.m * trial.n;
    Tensor out = new_tensor(like, {count * 4}, kByte);
    const auto floats = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
    cudaError_t error;
    if (way.is_hopper()) {
        const DscProduct product{quantized.const_data_ptr(),
                                 static_cast<const uint8_t*>(packed.const_data_ptr()) + head,
                                 floats(input_scale),
                                 floats(weight_scale),
                                 floats(bias),
                                 out.mutable_data_ptr(),
                                 dtype,
                                 dsc_none,
                                 trial.m,
                                 trial.n,
                                 trial.pitch,
                                 like.get_device_index(),
                                 multiprocessors(like.get_device_index())};
        error = dsc_hopper_product(&product, way.tile, stream);
    } else if (way.tile == Way::grouped) {
        error = multiply_grouped(trial, quantized, input_scale, out, dtype, like, stream);
    } else {
        error = dsc_int8_linear(static_cast<const int8_t*>(quantized.const_data_ptr()), floats(input_scale),
                                packed.const_data_ptr(), floats(weight_scale), floats(bias), out.mutable_data_ptr(),
                                dtype, dsc_none, trial.m, trial.n, trial.k, stream);
    }
    if (error != cudaSuccess) {
        cudaGetLastError();  // so that the next launch does not find it
        return false;
    }
    std::vector<uint8_t> got(count * 4);
    check_launch(cudaMemcpyAsync(got.data(), out.const_data_ptr(), got.size(), cudaMemcpyDeviceToHost, stream),
                 "verification");
    check_launch(cudaStreamSynchronize(stream), "verification");
    for (int64_t i = 0; i < count; i++) {
        const uint16_t rounded = to_bfloat16(trial.expected[i]);
        if (dtype == dsc_float32 ? std::memcmp(&got[i * 4], &trial.expected[i], 4) != 0
                                 : std::memcmp(&got[i * 2], &rounded, 2) != 0)
            return false;
    }
    return true;
}

bool try_out(const Way& way, const Tensor& like, cudaStream_t stream) {
    // The last row of tiles is never whole. 9, 20: two of the tiles of few rows; 70: the tile of many.
    // Of three experts: each of their tiles.
    const std::vector<int64_t> few{5, 9, 20}, many{70, 300}, grouped{40, 200, 400};
    for (const int64_t rows : way.tile == Way::few_rows ? few : way.tile == Way::grouped ? grouped : many)
        for (const int dtype : {dsc_float32, dsc_bfloat16})
            if (!try_out(way, rows, dtype, like, stream)) return false;
    return true;
}

}  // namespace

Verdict verify(const Way& way, const Tensor& like, cudaStream_t stream) {
    const int device = like.get_device_index();
    if (device < 0 || device >= most_devices) return Verdict::unknown;
    std::atomic<Verdict>& verdict = verdicts[device][way.index()];
    if (verdict.load(std::memory_order_acquire) == Verdict::unknown) {
        cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
        if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess || capture != cudaStreamCaptureStatusNone)
            return Verdict::unknown;
        // Threads that meet here try it out twice and come to the same answer.
        const bool is_right = try_out(way, like, stream);
        if (!is_right)
            std::fprintf(
                stderr,
                "ds_compress: %s give wrong sums on CUDA device %d and are not used there. Please report this GPU and "
                "driver.\n",
                way.name(), device);
        verdict.store(is_right ? Verdict::right : Verdict::wrong, std::memory_order_release);
    }
    return verdict.load(std::memory_order_acquire);
}

}  // namespace ds_compress::bindings
