// AVX2 with FMA and F16C: 8 lanes. One multiply-add of pairs of 16-bit integers (vpmaddwd) does
// twice the work of an F32 fused multiply-add. AVX-VNNI adds the sum.
#pragma once

#include <immintrin.h>

#include "kernels/isa/formats.h"

#define GGFT_LANES 8
#include "kernels/isa/portable.h"

namespace ggft::GGFT_ISA_NAMESPACE {

#if defined(__AVXVNNI__)
inline constexpr bool HAS_VNNI = true;
#else
inline constexpr bool HAS_VNNI = false;
#endif
inline constexpr bool HAS_BF16 = false, HAS_I16 = true, WINOGRAD = !HAS_VNNI;
inline constexpr bool HAS_BF16_TABLES = false;
inline constexpr Format FAST = Format::i16;
inline constexpr int MR = 6, NV = 2, LORA_RANKS = 4, TILE_COLUMNS = 4; // 16 registers
inline constexpr int64_t GROUP_WORDS = 96 << 10;

GGFT_INLINE V fma(V a, V b, V c) {
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
GGFT_INLINE V vmax(V a, V b) {
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
}

GGFT_INLINE float from_f16(uint16_t h) {
    return _cvtsh_ss(h);
}
GGFT_INLINE void f16_to_f32(const uint16_t * x, int64_t n, float * out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    for (; i < n; i++)
        out[i] = from_f16(x[i]);
}

GGFT_INLINE VI to_integers(V x) {
    return (VI)_mm256_cvtps_epi32((__m256)x);
}
GGFT_INLINE V to_floats(VI x) {
    return (V)_mm256_cvtepi32_ps((__m256i)x);
}
GGFT_INLINE VI larger(VI a, VI b) {
    return (VI)_mm256_max_epi32((__m256i)a, (__m256i)b);
}
GGFT_INLINE int32_t largest_lane(VI x) {
    __m128i m =
        _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtsi128_si32(m);
}
GGFT_INLINE void store_i16(int16_t * p, VI x) {
    const __m128i low = _mm256_castsi256_si128((__m256i)x);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi32(low, _mm256_extracti128_si256((__m256i)x, 1)));
}

/// acc + a.even * b.even + a.odd * b.odd, in each 32-bit lane, modulo 2^32.
GGFT_INLINE VI dot_i16(VI acc, VI a, VI b) {
#if defined(__AVXVNNI__)
    acc = (VI)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#else
    acc = (VI)((VU)acc + (VU)_mm256_madd_epi16((__m256i)a, (__m256i)b));
#endif
    // Sums stay where they are: moved ahead of them, the products would not fit into registers.
    asm("" : "+v"(acc));
    return acc;
}

/// x, loaded once: compilers would load it again for every row of a tile.
GGFT_INLINE VI in_register(VI x) {
    asm("" : "+x"(x));
    return x;
}

using portable::dot_bf16;
using portable::max_lanes;
using portable::pair_bf16;
using portable::sum_lanes;
using portable::sum_rows;
using portable::to_bf16;
using portable::transpose_words;
using portable::vexp;

} // namespace ggft::GGFT_ISA_NAMESPACE
