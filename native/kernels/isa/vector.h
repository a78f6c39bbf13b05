// One float vector type for every instruction set, so that the kernels are written once.
//
// `V` has LANES floats: 16 with AVX-512, 8 with AVX, 4 elsewhere (NEON, SSE2). It is a GCC/Clang
// vector-extension type: arithmetic works as on a float. Intrinsics appear only where the compilers
// do not find the instruction by themselves.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#if defined(__GNUC__) && !defined(__clang__) // GCC bug 105593: false alarms inside its header
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define GGFT_INLINE inline __attribute__((always_inline))
#define GGFT_UNROLL _Pragma("GCC unroll 32")

namespace ggft {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define GGFT_AVX512 1
inline constexpr int LANES = 16;
#elif defined(__AVX__)
inline constexpr int LANES = 8;
#else
inline constexpr int LANES = 4;
#endif

#if defined(GGFT_AVX512) && defined(__AVX512BF16__) && defined(__AVX512VL__)
#define GGFT_BF16_DOT 1
#endif

typedef float V __attribute__((vector_size(LANES * 4)));
typedef int32_t VI __attribute__((vector_size(LANES * 4)));
typedef uint32_t VU __attribute__((vector_size(LANES * 4)));
typedef uint16_t VH __attribute__((vector_size(LANES * 2)));

template <class T> GGFT_INLINE T load_as(const void * p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

GGFT_INLINE V load(const float * p) {
    return load_as<V>(p);
}
GGFT_INLINE void store(float * p, V v) {
    std::memcpy(p, &v, sizeof v);
}
GGFT_INLINE V splat(float x) {
    return x - V{};
} // x - 0 is x to the bit; x + 0 is not (-0)

/// a*b + c, rounded once where the machine has it.
GGFT_INLINE V fma(V a, V b, V c) {
#if defined(GGFT_AVX512)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

GGFT_INLINE V select(VI condition, V yes, V no) {
    return (V)(((VI)yes & condition) | ((VI)no & ~condition));
}
/// The larger of each lane; b where a is NaN.
GGFT_INLINE V vmax(V a, V b) {
#if defined(GGFT_AVX512)
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select(a > b, a, b);
#endif
}

/// Sum of all lanes, always in the same order (halves onto halves).
GGFT_INLINE float sum_lanes(V v) {
#if defined(GGFT_AVX512)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float x[LANES];
    store(x, v);
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++)
            x[i] += x[i + half];
    }
    return x[0];
#endif
}

GGFT_INLINE float max_lanes(V v) {
#if defined(GGFT_AVX512)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float x[LANES];
    store(x, v);
    float m = x[0];
    for (int i = 1; i < LANES; i++)
        m = x[i] > m ? x[i] : m;
    return m;
#endif
}

/// BF16 of a float, rounded to nearest even; NaN stays NaN.
GGFT_INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((bits >> 16) | 64);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

GGFT_INLINE float from_bf16(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

GGFT_INLINE VH to_bf16(V x) {
#if defined(GGFT_BF16_DOT)
    return (VH)_mm512_cvtneps_pbh((__m512)x);
#else
    const VU bits = (VU)x;
    const VU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const VU quiet_nan = (bits >> 16) | 64u;
    const VU is_nan = (VU)((VI)(bits & 0x7fffffffu) > 0x7f800000);
    return __builtin_convertvector((quiet_nan & is_nan) | (rounded & ~is_nan), VH);
#endif
}

GGFT_INLINE V load_bf16(const uint16_t * p) {
    return (V)(__builtin_convertvector(load_as<VH>(p), VU) << 16);
}
GGFT_INLINE void store_bf16(uint16_t * p, V x) {
    const VH h = to_bf16(x);
    std::memcpy(p, &h, sizeof h);
}

/// n floats as BF16 pairs, the last one padded with 0.
GGFT_INLINE void store_bf16_pairs(uint16_t * out, const float * x, int64_t n) {
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES)
        store_bf16(out + k, load(x + k));
    for (; k < n; k++)
        out[k] = to_bf16(x[k]);
    if (n % 2)
        out[n] = 0;
}

/// One 32-bit word per lane: the BF16 of `even` below, that of `odd` above.
GGFT_INLINE VU pair_bf16(V even, V odd) {
#if defined(GGFT_BF16_DOT)
    const __m512i low_then_high = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i index = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10001)),
                                           _mm512_set1_epi32(0x100000));
    return (VU)_mm512_permutexvar_epi16(index, low_then_high);
#else
    return __builtin_convertvector(to_bf16(even), VU) |
           (__builtin_convertvector(to_bf16(odd), VU) << 16);
#endif
}

/// e^r for |r| <= ln(2)/2, Taylor to the seventh power.
GGFT_INLINE V exp_reduced(V r) {
    V p = splat(1.98412698e-4f);
    p = fma(p, r, splat(1.38888889e-3f));
    p = fma(p, r, splat(8.33333333e-3f));
    p = fma(p, r, splat(4.16666667e-2f));
    p = fma(p, r, splat(1.66666667e-1f));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    return fma(p, r, splat(1.0f));
}

/// e^x within 2 ulp over [-87.3, 88.3]; 0 below, +inf above; NaN stays NaN.
/// e^x = 2^n * e^r, n = round(x/ln 2), ln 2 split in two (Cody and Waite 1980).
GGFT_INLINE V vexp(V x) {
#if defined(GGFT_AVX512)
    // max and min return their second operand if one is NaN
    const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-110.0f), (__m512)x);
    const __m512 v = _mm512_min_ps(_mm512_set1_ps(100.0f), bounded);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), 0);
    const V r = fma((V)n, splat(-1.42860677e-6f), fma((V)n, splat(-0.693145752f), (V)v));
    return (V)_mm512_scalef_ps((__m512)exp_reduced(r), n);
#else
    const V magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
    const V shifted = fma(x, splat(1.44269504f), magic);
    const V n = shifted - magic;
    const V r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), x));
    const VI exponent = ((VI)shifted << 23) + (VI)splat(1.0f); // 2^n as bits
    V y = exp_reduced(r) * (V)exponent;
    y = select(x < splat(-87.3f), V{}, y);
    y = select(x > splat(88.3f), splat(__builtin_inff()), y);
    return select(x == x, y, x);
#endif
}

constexpr int64_t round_up(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

/// [first, last) of `n` items for thread `ith` of `nth`, in whole multiples of `unit`.
struct Range {
    int64_t first, last;
};
GGFT_INLINE Range split_range(int64_t n, int64_t unit, int ith, int nth) {
    const int64_t units = (n + unit - 1) / unit;
    const int64_t first = units * ith / nth * unit, last = units * (ith + 1) / nth * unit;
    return {first < n ? first : n, last < n ? last : n};
}

} // namespace ggft
