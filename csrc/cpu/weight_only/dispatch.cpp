#include <stdexcept>
#include <string>

#include "weight_only.h"

namespace ds_compress::cpu {
namespace {

const WeightOnlyKernels* table_of(Isa isa) {
    switch (isa) {
        case Isa::scalar:
            return weight_only_scalar();
#if defined(__x86_64__)
        case Isa::avx2:
            return weight_only_avx2();
        case Isa::avx512:
            return weight_only_avx512();
#endif
        default:
            return nullptr;
    }
}

}  // namespace

const WeightOnlyKernels& weight_only_kernels() {
    static const WeightOnlyKernels* const chosen = table_of(isa());
    if (chosen == nullptr)
        throw std::runtime_error(std::string("the weight-only kernels were built without ") + name_of(isa()));
    return *chosen;
}

}  // namespace ds_compress::cpu
