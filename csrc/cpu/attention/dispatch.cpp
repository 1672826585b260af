#include <stdexcept>
#include <string>

#include "attention.h"

namespace ds_compress::cpu {
namespace {

const AttentionKernel* table_of(Isa isa) {
    switch (isa) {
        case Isa::scalar:
            return attention_scalar();
#if defined(__x86_64__)
        case Isa::avx2:
            return attention_avx2();
        case Isa::avx512:
            return attention_avx512();
#endif
        default:
            return nullptr;
    }
}

}  // namespace

const AttentionKernel& attention_kernel() {
    static const AttentionKernel* const chosen = table_of(isa());
    if (chosen == nullptr)
        throw std::runtime_error(std::string("the attention kernel was built without ") + name_of(isa()));
    return *chosen;
}

}  // namespace ds_compress::cpu
