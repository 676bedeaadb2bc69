// bf16 for g++, bit for bit as the GPU converts: to nearest, ties to even; every NaN becomes 0x7fff;
// infinities, subnormals and the sign of zero are kept. Arithmetic is not here: kernels compute in float.
#pragma once
#include <bit>
#include <cstdint>
#include "types.h"

namespace sim {
inline constexpr uint16_t bf16_bits(float f) {
    const uint32_t x = std::bit_cast<uint32_t>(f);
    if ((x & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((x + 0x7fffu + (x >> 16 & 1)) >> 16);
}
inline constexpr float bf16_value(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
}  // namespace sim

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    constexpr __nv_bfloat16(float f) : bits(sim::bf16_bits(f)) {}
    constexpr __nv_bfloat16(double f) : bits(sim::bf16_bits(static_cast<float>(f))) {}
    constexpr __nv_bfloat16(int f) : bits(sim::bf16_bits(static_cast<float>(f))) {}
    constexpr operator float() const { return sim::bf16_value(bits); }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct __nv_bfloat16_raw {
    unsigned short x;
    constexpr operator __nv_bfloat16() const { return std::bit_cast<__nv_bfloat16>(x); }
};

inline constexpr __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
inline constexpr __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
inline constexpr float __bfloat162float(__nv_bfloat16 b) { return static_cast<float>(b); }
inline constexpr __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
inline constexpr __nv_bfloat162 __float22bfloat162_rn(float2 v) {
    return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)};
}
inline constexpr float2 __bfloat1622float2(__nv_bfloat162 v) {
    return {static_cast<float>(v.x), static_cast<float>(v.y)};
}
inline constexpr float __low2float(__nv_bfloat162 v) { return static_cast<float>(v.x); }
inline constexpr float __high2float(__nv_bfloat162 v) { return static_cast<float>(v.y); }
inline constexpr __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline constexpr unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
inline constexpr __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    return std::bit_cast<__nv_bfloat16>(bits);
}
