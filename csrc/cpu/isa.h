// Which instruction set the kernels run on, chosen once per process.
#pragma once

namespace ds_compress::cpu {

// In the order of preference: a later one is faster and needs all of an earlier one.
enum class Isa { scalar = 0, avx2 = 1, avx512 = 2 };

// The best instruction set of this CPU, or the one that the environment variable DS_COMPRESS_CPU_ISA names
// (scalar, avx2, avx512: for tests and for comparing). avx2 means AVX2, FMA and F16C; avx512 means F, BW, DQ, VL
// and VNNI. Throws std::runtime_error for a name that is not known or that this CPU does not have.
Isa isa();

const char* name_of(Isa isa);

// Whether kernels may use AMX with int8 values, with bf16 numbers: `isa()` was not named by the environment, and CPU
// and system allow it. Asks the system for this process's tiles the first time.
bool has_amx_int8();
bool has_amx_bf16();

}  // namespace ds_compress::cpu
