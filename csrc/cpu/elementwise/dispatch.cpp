#include "../isa.h"
#include "kernels.h"

namespace ds_compress::cpu {

const ElementwiseKernels& elementwise() {
    const ElementwiseKernels* table = nullptr;
    switch (isa()) {
        case Isa::avx512:
            table = elementwise_avx512();
            break;
        case Isa::avx2:
            table = elementwise_avx2();
            break;
        case Isa::scalar:
            break;
    }
    return *(table != nullptr ? table : elementwise_scalar());
}

}  // namespace ds_compress::cpu
