// ldmatrix and the int8 matrix instructions, written from the fragment layouts of the PTX ISA ("Warp Level
// Matrix Instructions"). They are ours, so they prove nothing alone: PTX that Triton generated, whose layouts
// ran on hardware, has to come out right on them too (test_ptx_on_cpu.py).
#pragma once

#include "collectives.h"
#include "memory.h"

namespace ds_compress::emulator {

struct MatrixRows {
    const void* address;
    uint32_t row[4];      // the 16 bytes that this lane's address names
    uint32_t* fragments;  // one word of each of the four matrices
};

/// Eight rows are read at a time: they must lie in different banks, or the hardware takes another turn.
DSC_UNWATCHED inline void distribute_rows(void** slots, uint32_t present) {
    if (present != ~0u) fail("ldmatrix needs the whole warp");
    for (int matrix = 0; matrix < 4; matrix++) {
        uint32_t banks = 0;
        bool conflict = false;
        for (int i = 0; i < 8; i++) {
            const auto address = reinterpret_cast<uintptr_t>(static_cast<MatrixRows*>(slots[matrix * 8 + i])->address);
            const uint32_t touched = 0xFu << (address / 4 % 32);
            conflict = conflict || (banks & touched) != 0;
            banks |= touched;
        }
        statistics.ldmatrix_phases++;
        statistics.bank_conflicts += conflict;
        for (int lane = 0; lane < 32; lane++) {
            const auto* const owner = static_cast<MatrixRows*>(slots[matrix * 8 + lane / 4]);
            static_cast<MatrixRows*>(slots[lane])->fragments[matrix] = owner->row[lane % 4];
        }
    }
}

struct Fragments {
    int* sums;
    const uint32_t *a, *b;
};

DSC_UNWATCHED inline void put_word(int8_t* to, uint32_t word) { std::memcpy(to, &word, 4); }

DSC_UNWATCHED inline void add_product(void** slots, const int8_t (*a)[32], const int8_t (*b)[32]) {
    for (int lane = 0; lane < 32; lane++) {
        int* const sums = static_cast<Fragments*>(slots[lane])->sums;
        for (int i = 0; i < 4; i++) {
            const int8_t *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
            int sum = 0;
            for (int k = 0; k < 32; k++) sum += row[k] * column[k];
            sums[i] = static_cast<int>(static_cast<uint32_t>(sums[i]) + static_cast<uint32_t>(sum));
        }
    }
}

/// m16n8k32: a0, a1 hold rows g and g + 8 of the left half of k, a2, a3 of the right half; g = lane / 4.
DSC_UNWATCHED inline void multiply_fragments(void** slots, uint32_t present) {
    if (present != ~0u) fail("mma needs the whole warp");
    int8_t a[16][32], b[8][32];
    for (int lane = 0; lane < 32; lane++) {
        const auto* const mine = static_cast<Fragments*>(slots[lane]);
        const int group = lane / 4, k = lane % 4 * 4;
        for (int i = 0; i < 4; i++) put_word(&a[group + i % 2 * 8][k + i / 2 * 16], mine->a[i]);
        for (int i = 0; i < 2; i++) put_word(&b[group][k + i * 16], mine->b[i]);
    }
    add_product(slots, a, b);
}

}  // namespace ds_compress::emulator

namespace ds_compress {

inline void ldmatrix_x4(uint32_t (&rows)[4], const void* row) {
    emulator::check_aligned(row, 16, "ldmatrix from an address that is not 16-byte aligned");
    emulator::MatrixRows mine{row, {}, rows};
    for (int i = 0; i < 4; i++) mine.row[i] = static_cast<const uint32_t*>(row)[i];  // seen by the sanitizers
    emulator::meet(~0u, emulator::load_matrix, &mine, emulator::distribute_rows);
}

inline void mma_s8_16x8x32(int (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    emulator::Fragments mine{sums, a, b};
    emulator::meet(~0u, emulator::multiply, &mine, emulator::multiply_fragments);
}

}  // namespace ds_compress
