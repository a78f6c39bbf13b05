// What kernels use besides vectors, always inlined.
//
// Kernels are compiled once for each instruction set, and of an inline function that stands in
// several objects a linker keeps one: it must not be the one made of AVX-512. So kernels live in a
// namespace per instruction set, share nothing but types and the functions here, and use no
// function templates of std.
#pragma once

#include <cstdint>
#include <cstring>

#define GGFT_INLINE inline __attribute__((always_inline))
#define GGFT_UNROLL _Pragma("GCC unroll 32")

namespace ggft {

template <class T> GGFT_INLINE constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T> GGFT_INLINE constexpr T max(T a, T b) {
    return a < b ? b : a;
}

GGFT_INLINE void fill(float * first, float * last, float value) {
    for (; first < last; first++)
        *first = value;
}

GGFT_INLINE constexpr int64_t round_up(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

/// [first, last) of `n` items for thread `ith` of `nth`, in whole multiples of `unit`.
struct Range {
    int64_t first, last;
};
GGFT_INLINE Range split_range(int64_t n, int64_t unit, int ith, int nth) {
    const int64_t units = (n + unit - 1) / unit;
    const int64_t first = units * ith / nth * unit, last = units * (ith + 1) / nth * unit;
    return {min(first, n), min(last, n)};
}

template <class T> GGFT_INLINE T load_as(const void * p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

/// BF16 of a float, rounded to nearest even; NaN stays NaN.
GGFT_INLINE uint16_t to_bf16(float x) {
    const uint32_t bits = load_as<uint32_t>(&x);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((bits >> 16) | 64);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

GGFT_INLINE float from_bf16(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    return load_as<float>(&bits);
}

} // namespace ggft
