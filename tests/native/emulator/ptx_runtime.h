// What the C++ that ptx_to_cpp.py writes is made of. Registers are plain bits; an instruction says what they mean.
#pragma once

#include <cfenv>
#include <limits>

#include "emulator.h"

namespace ds_compress::ptx {

using emulator::bit_cast;
using emulator::fail;

/// The low bits of a register (or of a literal) as a T.
template <class T, class Register>
inline T get(Register bits) {
    static_assert(sizeof(T) <= sizeof(Register), "an operand that is wider than its register");
    if constexpr (std::is_same_v<T, bool>) return bits;
    else if constexpr (sizeof(T) == 8) return bit_cast<T>(static_cast<uint64_t>(bits));
    else if constexpr (sizeof(T) == 4) return bit_cast<T>(static_cast<uint32_t>(bits));
    else if constexpr (sizeof(T) == 2) return bit_cast<T>(static_cast<uint16_t>(bits));
    else return bit_cast<T>(static_cast<uint8_t>(bits));
}

/// Writes a value; a wider register is filled by its sign, as ld and cvt do.
template <class Register, class T>
inline void set(Register& to, T value) {
    static_assert(sizeof(T) <= sizeof(Register), "a result that is wider than its register");
    if constexpr (std::is_same_v<Register, bool>) to = value;
    else if constexpr (std::is_floating_point_v<T>) {
        static_assert(sizeof(T) == sizeof(Register));
        to = bit_cast<Register>(value);
    } else to = static_cast<Register>(static_cast<std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>(value));
}

// --- memory ------------------------------------------------------------------------------------------------

template <class T>
inline T* global(uint64_t address, int count = 1) {
    if (address % (sizeof(T) * static_cast<unsigned>(count)) != 0) fail("a misaligned access to global memory");
    return reinterpret_cast<T*>(address);
}

/// Shared addresses count from the block's first byte; static arrays come before the dynamic ones.
template <class T>
inline T* shared(uint32_t address, int count = 1) {
    const size_t bytes = sizeof(T) * static_cast<unsigned>(count);
    if (address % bytes != 0) fail("a misaligned access to shared memory");
    if (address + bytes > emulator::block->arena.dynamic_bytes()) fail("an access beyond shared memory");
    return reinterpret_cast<T*>(emulator::block->arena.dynamic() + address);
}

inline uint64_t generic_of_shared(uint64_t address) {
    return reinterpret_cast<uint64_t>(emulator::block->arena.dynamic()) + address;
}
inline uint64_t shared_of_generic(uint64_t address) { return address - generic_of_shared(0); }

inline void copy_async_16(uint32_t to, uint64_t from, uint32_t bytes) {
    if (bytes != 0 && bytes != 16) fail("cp.async of neither 0 nor 16 bytes");
    ds_compress::copy_async_16(shared<uint32_t>(to, 4), reinterpret_cast<const void*>(from), bytes == 16);
}

// --- arithmetic --------------------------------------------------------------------------------------------

/// a * b + c, rounded towards minus infinity: exact product in double, and rounding down twice is rounding down.
__attribute__((noinline)) inline float fma_down(float a, float b, float c) {
    const int before = std::fegetround();
    std::fesetround(FE_DOWNWARD);
    volatile double sum = static_cast<double>(a) * b;
    sum = sum + c;
    volatile float result = static_cast<float>(sum);
    std::fesetround(before);
    return result;
}

/// Float to integer after rounding: saturates, 0 for NaN.
template <class T>
inline T to_integer(float whole) {
    if (whole != whole) return 0;
    if (whole <= static_cast<float>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
    if (whole >= static_cast<float>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
    return static_cast<T>(whole);
}

template <class T>
inline T shift_left(T value, uint32_t by) {
    return by >= sizeof(T) * 8 ? T{0} : static_cast<T>(value << by);
}
template <class T>
inline T shift_right(T value, uint32_t by) {
    constexpr uint32_t width = sizeof(T) * 8;
    return static_cast<T>(value >> (by >= width ? width - 1 : by)) >> (by >= width ? 1 : 0);
}

/// `length` bits of `value` from `position` on; the sign of a signed T is the field's top bit.
template <class T>
inline T extract_bits(T value, uint32_t position, uint32_t length) {
    constexpr uint32_t width = sizeof(T) * 8;
    if (position >= width || length == 0 || position + length > width) fail("bfe of a field that is not all there");
    using U = std::make_unsigned_t<T>;
    const U field = static_cast<U>(static_cast<U>(value) << (width - position - length));
    return static_cast<T>(static_cast<T>(field) >> (width - length));
}

inline uint32_t insert_bits(uint32_t field, uint32_t into, uint32_t position, uint32_t length) {
    if (position + length > 32) fail("bfi of a field that is not all there");
    const uint32_t mask = static_cast<uint32_t>(((uint64_t{1} << length) - 1) << position);
    return (into & ~mask) | (shift_left(field, position) & mask);
}

// --- warp --------------------------------------------------------------------------------------------------

/// shfl.sync.bfly: `clamp` holds the segment mask in bits 8 .. 12 and the last lane in bits 0 .. 4.
/// `valid`: whether the lane to read is in my segment; else I read myself.
inline uint32_t shuffle_butterfly(uint32_t mask, uint32_t value, uint32_t distance, uint32_t clamp,
                                  bool& valid) {
    const uint32_t lane = static_cast<uint32_t>(emulator::my_lane()), segment = clamp >> 8 & 31;
    const uint32_t last = (lane & segment) | (clamp & 31 & ~segment), source = lane ^ (distance & 31);
    valid = source <= last;
    return emulator::exchange(mask, value, static_cast<int>(valid ? source : lane));
}

}  // namespace ds_compress::ptx
