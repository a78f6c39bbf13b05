// The vector type of GGFT_LANES floats, which the instruction set's header defines, and primitives
// in plain C++ for those that it has no instruction for.
//
// `V` is a GCC/Clang vector-extension type: arithmetic works as on a float.
#pragma once

#include "ggml.h"
#include "kernels/isa/inline.h"

namespace ggft::GGFT_ISA_NAMESPACE {

inline constexpr int LANES = GGFT_LANES;

typedef float V __attribute__((vector_size(LANES * 4)));
typedef int32_t VI __attribute__((vector_size(LANES * 4)));
typedef uint32_t VU __attribute__((vector_size(LANES * 4)));
typedef uint16_t VH __attribute__((vector_size(LANES * 2)));
typedef int16_t VS __attribute__((vector_size(LANES * 2)));

GGFT_INLINE V load(const float * p) {
    return load_as<V>(p);
}
GGFT_INLINE void store(float * p, V v) {
    std::memcpy(p, &v, sizeof v);
}
GGFT_INLINE V splat(float x) {
    return x - V{};
} // x - 0 is x to the bit; x + 0 is not (-0)

GGFT_INLINE V select(VI condition, V yes, V no) {
    return (V)(((VI)yes & condition) | ((VI)no & ~condition));
}

/// first, first + 1, ...
GGFT_INLINE VI lane_numbers(int32_t first = 0) {
    VI lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    return lane + first;
}

/// a*b + c, rounded once where the machine has it. Every instruction set defines it.
GGFT_INLINE V fma(V a, V b, V c);

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

namespace portable {

/// The larger of each lane; b where a is NaN.
GGFT_INLINE V vmax(V a, V b) {
    return select(a > b, a, b);
}

/// Sum of all lanes, always in the same order (halves onto halves).
GGFT_INLINE float sum_lanes(V v) {
    float x[LANES];
    store(x, v);
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++)
            x[i] += x[i + half];
    }
    return x[0];
}

GGFT_INLINE float max_lanes(V v) {
    float x[LANES];
    store(x, v);
    float m = x[0];
    for (int i = 1; i < LANES; i++)
        m = x[i] > m ? x[i] : m;
    return m;
}

/// out[r] = sum of the lanes of v[r].
template <int R> GGFT_INLINE void sum_rows(const V (&v)[R], float * out) {
    GGFT_UNROLL for (int r = 0; r < R; r++) out[r] = sum_lanes(v[r]);
}

/// e^x within 2 ulp over [-87.3, 88.3]; 0 below, +inf above; NaN stays NaN.
/// e^x = 2^n * e^r, n = round(x/ln 2), ln 2 split in two (Cody and Waite 1980).
GGFT_INLINE V vexp(V x) {
    const V magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
    const V shifted = fma(x, splat(1.44269504f), magic);
    const V n = shifted - magic;
    const V r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), x));
    const VI exponent = ((VI)shifted << 23) + (VI)splat(1.0f); // 2^n as bits
    V y = exp_reduced(r) * (V)exponent;
    y = select(x < splat(-87.3f), V{}, y);
    y = select(x > splat(88.3f), splat(__builtin_inff()), y);
    return select(x == x, y, x);
}

/// out[j][i] = in[i][j] for LANES rows `in_stride` apart and `steps` columns of words.
GGFT_INLINE void transpose_words(const uint32_t * in, int64_t in_stride, int64_t steps,
                                 uint32_t * out, int64_t out_stride) {
    typedef uint32_t W4 __attribute__((vector_size(16)));
    int64_t s = 0;
    for (; s + 4 <= steps; s += 4) {
        for (int i = 0; i < LANES; i += 4) {
            const uint32_t * p = in + i * in_stride + s;
            const W4 a = load_as<W4>(p), b = load_as<W4>(p + in_stride),
                     c = load_as<W4>(p + 2 * in_stride), d = load_as<W4>(p + 3 * in_stride);
            const W4 ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5);
            const W4 ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            const W4 cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5);
            const W4 cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
            const W4 rows[4] = {__builtin_shufflevector(ab0, cd0, 0, 1, 4, 5),
                                __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7),
                                __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5),
                                __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7)};
            for (int j = 0; j < 4; j++)
                std::memcpy(out + (s + j) * out_stride + i, &rows[j], 16);
        }
    }
    for (; s < steps; s++) {
        for (int i = 0; i < LANES; i++)
            out[s * out_stride + i] = in[i * in_stride + s];
    }
}

// ---- F16 and BF16 ----

GGFT_INLINE float from_f16(uint16_t h) {
    return ggml_fp16_to_fp32(h);
}
GGFT_INLINE void f16_to_f32(const uint16_t * x, int64_t n, float * out) {
    ggml_fp16_to_fp32_row(x, out, n);
}

/// Denormals as zeros of their sign: what the instructions for BF16 read and write.
GGFT_INLINE V flush(V x) {
    const VI normal = ((VI)x & 0x7f800000) != 0;
    return (V)((VI)x & (normal | (VI)splat(-0.0f)));
}

/// BF16 of every lane, rounded to nearest even; NaN stays NaN, denormals become zeros.
GGFT_INLINE VH to_bf16(V x) {
    const VU bits = (VU)flush(x);
    const VU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const VU quiet_nan = (bits >> 16) | 64u;
    const VU is_nan = (VU)((VI)(bits & 0x7fffffffu) > 0x7f800000);
    return __builtin_convertvector((quiet_nan & is_nan) | (rounded & ~is_nan), VH);
}

/// One 32-bit word per lane: the BF16 of `even` below, that of `odd` above.
GGFT_INLINE VU pair_bf16(V even, V odd) {
    return __builtin_convertvector(to_bf16(even), VU) |
           (__builtin_convertvector(to_bf16(odd), VU) << 16);
}

/// acc + a.odd * b.odd + a.even * b.even of pairs, each sum rounded to nearest even: what
/// VDPBF16PS computes (Intel's Software Developer's Manual). The product of two BF16 is exact, so
/// that it is the same whether the machine fuses it with the sum.
GGFT_INLINE V dot_bf16(V acc, V a, V b) {
    const auto low = [](V pair) { return flush((V)((VU)pair << 16)); };
    const auto high = [](V pair) { return flush((V)((VU)pair & 0xffff0000u)); };
    acc = flush(fma(high(a), high(b), flush(acc)));
    return flush(fma(low(a), low(b), acc));
}

// ---- 16-bit integers ----

/// Rounded to nearest even; of magnitudes below 2^22.
GGFT_INLINE VI to_integers(V x) {
    const V magic = splat(12582912.0f); // 1.5 * 2^23
    return (VI)(x + magic) - (VI)magic;
}
GGFT_INLINE V to_floats(VI x) {
    return __builtin_convertvector(x, V);
}
GGFT_INLINE VI larger(VI a, VI b) {
    const VI more = a > b;
    return (a & more) | (b & ~more);
}
GGFT_INLINE int32_t largest_lane(VI x) {
    int32_t m = x[0];
    for (int i = 1; i < LANES; i++)
        m = max(m, (int32_t)x[i]);
    return m;
}
GGFT_INLINE void store_i16(int16_t * p, VI x) {
    const VS h = __builtin_convertvector(x, VS);
    std::memcpy(p, &h, sizeof h);
}

/// acc + a.even * b.even + a.odd * b.odd, in each 32-bit lane, modulo 2^32.
GGFT_INLINE VI dot_i16(VI acc, VI a, VI b) {
    const auto low = [](VI pair) { return (VU)((VI)((VU)pair << 16) >> 16); };
    const auto high = [](VI pair) { return (VU)(pair >> 16); };
    return (VI)((VU)acc + low(a) * low(b) + high(a) * high(b));
}

/// x, which compilers might load again for every use.
GGFT_INLINE VI in_register(VI x) {
    return x;
}

} // namespace portable
} // namespace ggft::GGFT_ISA_NAMESPACE
