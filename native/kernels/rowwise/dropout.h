// The dropout mask as a pure function of (seed, row, column): forward, recomputation and backward
// get the same mask without storing it, in any order, on any thread.
//
//   factor(t, c) = 0 with probability p, else 1/(1 - p)
//
// The hash is a 32-bit finalizer (xor-shift-multiply, constants of Chris Wellons' hash-prospector)
// of column * odd + row key; the row key mixes seed and row in 64 bits (splitmix64).
#pragma once

#include "kernels/isa/inline.h"

namespace ggft {

GGFT_INLINE uint64_t dropout_mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

GGFT_INLINE uint32_t dropout_row_key(uint64_t seed, int64_t row) {
    const uint64_t golden = 0x9e3779b97f4a7c15ull;
    return (uint32_t)(dropout_mix(dropout_mix(seed + golden) + (uint64_t)(row + 1) * golden) >> 32);
}

template <class U> GGFT_INLINE U dropout_hash(U x) {
    x ^= x >> 16;
    x *= 0x21f0aaadu;
    x ^= x >> 15;
    x *= 0xd35a2d97u;
    x ^= x >> 15;
    return x;
}

/// Smallest 24-bit hash that is kept: P(hash24 < threshold) = p to 2^-24.
GGFT_INLINE int32_t dropout_threshold(float p) {
    return (int32_t)(p * 16777216.0f);
}

/// The factor of one element: the definition that the tests compare with.
GGFT_INLINE float dropout_factor(uint64_t seed, int64_t row, int64_t column, float p) {
    const uint32_t hash =
        dropout_hash((uint32_t)column * 0x9e3779b1u + dropout_row_key(seed, row)) >> 8;
    return (int32_t)hash >= dropout_threshold(p) ? 1.0f / (1.0f - p) : 0.0f;
}

} // namespace ggft
