#include <stdexcept>
#include <string>

#include "linear.h"

namespace ds_compress::cpu {
namespace {

const LinearKernels* table_of(Isa isa) {
    switch (isa) {
        case Isa::scalar:
            return linear_scalar();
#if defined(__x86_64__)
        case Isa::avx2:
            return linear_avx2();
        case Isa::avx512:
            return has_amx_int8() ? linear_amx() : linear_avx512();
#endif
        default:
            return nullptr;
    }
}

}  // namespace

const LinearKernels& linear_kernels() {
    static const LinearKernels* const chosen = table_of(isa());
    if (chosen == nullptr)
        throw std::runtime_error(std::string("the linear kernels were built without ") + name_of(isa()));
    return *chosen;
}

}  // namespace ds_compress::cpu
