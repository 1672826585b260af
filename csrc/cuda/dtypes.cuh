// From the number of a dtype to its type, once for all launchers.
#pragma once

#include "ds_compress/device.h"
#include "launchers.h"

namespace ds_compress {

/// run(T()) for the element type T that `dtype` (a DscDtype) names; no launch and an error for any other number.
template <class Run>
inline cudaError_t with_dtype(int dtype, const Run& run) {
    switch (dtype) {
        case dsc_float32:
            return run(float());
        case dsc_bfloat16:
            return run(__nv_bfloat16());
        case dsc_float16:
            return run(__half());
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace ds_compress
