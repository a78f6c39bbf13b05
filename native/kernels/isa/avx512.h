// AVX-512 (F, BW, DQ, VL): 16 lanes. With BF16, one instruction multiplies and adds pairs of BF16;
// without, products take 16-bit integers, to which VNNI adds the sum.
#pragma once

#include <immintrin.h>

#include "kernels/isa/formats.h"

#define GGFT_LANES 16
#include "kernels/isa/portable.h"

namespace ggft::GGFT_ISA_NAMESPACE {

#if defined(__AVX512BF16__)
inline constexpr bool HAS_BF16 = true, HAS_I16 = false;
inline constexpr Format FAST = Format::bf16;
#else
inline constexpr bool HAS_BF16 = false, HAS_I16 = true;
inline constexpr Format FAST = Format::i16;
#endif
inline constexpr bool WINOGRAD = false, HAS_BF16_TABLES = HAS_BF16;
// Of 32 registers: 28 accumulators, 2 panel vectors, 2 for broadcasts.
inline constexpr int MR = 14, NV = 2, LORA_RANKS = 8, TILE_COLUMNS = 8;
inline constexpr int64_t GROUP_WORDS = 192 << 10;

GGFT_INLINE V fma(V a, V b, V c) {
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
GGFT_INLINE V vmax(V a, V b) {
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
}
GGFT_INLINE float sum_lanes(V v) {
    return _mm512_reduce_add_ps((__m512)v);
}
GGFT_INLINE float max_lanes(V v) {
    return _mm512_reduce_max_ps((__m512)v);
}

/// out[r] = sum of the lanes of v[r].
template <int R> GGFT_INLINE void sum_rows(const V (&v)[R], float * out) {
    if constexpr (R == 8) { // a tree that folds lanes and merges rows at once
        __m512 pair[4], quad[2];
        GGFT_UNROLL for (int i = 0; i < 4; i++) {
            const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
            pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        GGFT_UNROLL for (int i = 0; i < 2; i++) {
            const __m512d a = (__m512d)pair[2 * i], b = (__m512d)pair[2 * i + 1];
            quad[i] =
                _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
        }
        const __m512 half = _mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88),
                                          _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd));
        const __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(half, half, 0x08),
                                         _mm512_shuffle_f32x4(half, half, 0x0d));
        _mm256_storeu_ps(out, _mm512_castps512_ps256(all));
    } else {
        GGFT_UNROLL for (int r = 0; r < R; r++) out[r] = sum_lanes(v[r]);
    }
}

/// As portable::vexp.
GGFT_INLINE V vexp(V x) {
    // max and min return their second operand if one is NaN
    const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-110.0f), (__m512)x);
    const __m512 v = _mm512_min_ps(_mm512_set1_ps(100.0f), bounded);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), 0);
    const V r = fma((V)n, splat(-1.42860677e-6f), fma((V)n, splat(-0.693145752f), (V)v));
    return (V)_mm512_scalef_ps((__m512)exp_reduced(r), n);
}

/// out[j][i] = in[i][j] for LANES rows `in_stride` apart and `steps` columns of words.
GGFT_INLINE void transpose_words(const uint32_t * in, int64_t in_stride, int64_t steps,
                                 uint32_t * out, int64_t out_stride) {
    int64_t s = 0;
    for (; s + 16 <= steps; s += 16) {
        __m512i a[16], b[16];
        // Rows i, i+4, i+8, i+12 share a register by 128-bit quarters, so 4x4 transposes finish it.
        GGFT_UNROLL for (int q = 0; q < 4; q++) {
            GGFT_UNROLL for (int i = 0; i < 4; i++) {
                const uint32_t * p = in + i * in_stride + s + 4 * q;
                __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
                v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 4 * in_stride)), 1);
                v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 8 * in_stride)), 2);
                v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 12 * in_stride)),
                                       3);
                a[4 * q + i] = v;
            }
            GGFT_UNROLL for (int i = 0; i < 2; i++) {
                b[2 * i] = _mm512_unpacklo_epi32(a[4 * q + 2 * i], a[4 * q + 2 * i + 1]);
                b[2 * i + 1] = _mm512_unpackhi_epi32(a[4 * q + 2 * i], a[4 * q + 2 * i + 1]);
            }
            uint32_t * o = out + (s + 4 * q) * out_stride;
            _mm512_storeu_si512(o, _mm512_unpacklo_epi64(b[0], b[2]));
            _mm512_storeu_si512(o + out_stride, _mm512_unpackhi_epi64(b[0], b[2]));
            _mm512_storeu_si512(o + 2 * out_stride, _mm512_unpacklo_epi64(b[1], b[3]));
            _mm512_storeu_si512(o + 3 * out_stride, _mm512_unpackhi_epi64(b[1], b[3]));
        }
    }
    for (; s < steps; s++) {
        for (int i = 0; i < LANES; i++)
            out[s * out_stride + i] = in[i * in_stride + s];
    }
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

#if defined(__AVX512BF16__)
GGFT_INLINE VH to_bf16(V x) {
    return (VH)_mm512_cvtneps_pbh((__m512)x);
}

/// One 32-bit word per lane: the BF16 of `even` below, that of `odd` above.
GGFT_INLINE VU pair_bf16(V even, V odd) {
    const __m512i low_then_high = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i index = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10001)),
                                           _mm512_set1_epi32(0x100000));
    return (VU)_mm512_permutexvar_epi16(index, low_then_high);
}

/// acc + a.odd * b.odd + a.even * b.even.
GGFT_INLINE V dot_bf16(V acc, V a, V b) {
    return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#else
using portable::dot_bf16;
using portable::pair_bf16;
using portable::to_bf16;
#endif

GGFT_INLINE VI to_integers(V x) {
    return (VI)_mm512_cvtps_epi32((__m512)x);
}
GGFT_INLINE V to_floats(VI x) {
    return (V)_mm512_cvtepi32_ps((__m512i)x);
}
GGFT_INLINE VI larger(VI a, VI b) {
    return (VI)_mm512_max_epi32((__m512i)a, (__m512i)b);
}
GGFT_INLINE int32_t largest_lane(VI x) {
    return _mm512_reduce_max_epi32((__m512i)x);
}
GGFT_INLINE void store_i16(int16_t * p, VI x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtsepi32_epi16((__m512i)x));
}

/// acc + a.even * b.even + a.odd * b.odd, in each 32-bit lane, modulo 2^32.
GGFT_INLINE VI dot_i16(VI acc, VI a, VI b) {
#if defined(__AVX512VNNI__)
    acc = (VI)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#else
    acc = (VI)((VU)acc + (VU)_mm512_madd_epi16((__m512i)a, (__m512i)b));
#endif
    // Sums stay where they are: moved ahead of them, the products would not fit into registers.
    asm("" : "+v"(acc));
    return acc;
}

using portable::in_register;

} // namespace ggft::GGFT_ISA_NAMESPACE
