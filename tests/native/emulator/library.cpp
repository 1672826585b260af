// Linked into every library that the harness builds: how Python steers the emulator.
#include "ds_compress/device.h"

using namespace ds_compress::emulator;

extern "C" void dsc_emulator_schedule(int seed) { schedule = seed; }

/// launches, blocks, fiber switches, collectives, ldmatrix phases, bank conflicts since the library was loaded
extern "C" void dsc_emulator_statistics(uint64_t* counts) { std::memcpy(counts, &statistics, sizeof(statistics)); }
