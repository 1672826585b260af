#include "elementwise_cpu.h"

using namespace ds_compress::bindings;

STABLE_TORCH_LIBRARY_IMPL(ds_compress, CPU, m) { Elementwise<Cpu>::register_in(m); }
