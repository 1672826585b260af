// Facts of a CUDA device, asked for once: for the launchers and the bindings.
#pragma once

#include <cuda_runtime_api.h>

namespace ds_compress {

/// A table that remembers `ask()` for every device; threads that meet here write the same value.
class OncePerDevice {
public:
    template <class Ask>
    int get(int device, const Ask& ask) {
        if (device < 0 || device >= 64) return ask();
        if (known_[device] == 0) known_[device] = ask();
        return known_[device];
    }

private:
    int known_[64] = {};
};

inline int device_attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess && value > 0 ? value : 1;
}

inline int multiprocessors(int device) {
    static OncePerDevice known;
    return known.get(device, [&] { return device_attribute(cudaDevAttrMultiProcessorCount, device); });
}

/// 9 on Hopper, for which alone the code of sm_90a is.
inline int major_version(int device) {
    static OncePerDevice known;
    return known.get(device, [&] { return device_attribute(cudaDevAttrComputeCapabilityMajor, device); });
}

}  // namespace ds_compress
