// Products of 16-bit integers with a scale per block: the fast path of machines that have no BF16
// dot product. One multiply-add of pairs (vpmaddwd) does twice the work of an F32 fused
// multiply-add, and the factors keep more bits than BF16's eight.
//
// Both factors are cut into blocks of I16_DEPTH reduction indices, for each row of x and each
// column of the panel. A block is the largest magnitude over the limit as F32 scale, and integers
// up to the limit. The limits are such that a block's sum of products fits into 32 bits:
// 64 * 16383 * 2047 < 2^31. x gets the larger one, as activations have outliers; in attention,
// where both are activations, 64 * 5792 * 5792 < 2^31.
//
// A panel holds blocks of [I16_STEPS][NR] words (two integers of consecutive reduction indices)
// and then [NR] scales. A block with a NaN or an infinity has that scale, so that it shows in y.
#pragma once

#include <algorithm>

#include "kernels_micro.h"

namespace ggft {

#if !defined(GGFT_BF16_DOT) && (defined(GGFT_AVX512) || defined(__AVX2__))
#define GGFT_I16 1
inline constexpr bool HAS_I16 = true;
#else
inline constexpr bool HAS_I16 = false;
#endif

inline constexpr int64_t I16_DEPTH = 64;
inline constexpr int I16_STEPS = I16_DEPTH / 2;
inline constexpr int I16_PANEL_STEPS = I16_STEPS + 1;    // that of the scales included
inline constexpr int I16_BLOCKS = MAX_STEPS / I16_STEPS; // of a tile row
inline constexpr float I16_ROW_LIMIT = 16383, I16_PANEL_LIMIT = 2047, I16_EVEN_LIMIT = 5792;

#if defined(GGFT_I16)

#if defined(GGFT_AVX512)
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
#else
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
#endif

/// acc + a.even * b.even + a.odd * b.odd, in each 32-bit lane.
GGFT_INLINE VI dot_i16(VI acc, VI a, VI b) {
#if defined(GGFT_AVX512) && defined(__AVX512VNNI__)
    acc = (VI)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(GGFT_AVX512)
    acc += (VI)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    acc = (VI)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#else
    acc += (VI)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
    // Sums stay where they are: moved ahead of them, the products would not fit into registers.
    asm("" : "+v"(acc));
    return acc;
}

/// Magnitudes as integers: these order as floats do, with infinities and NaN above all.
GGFT_INLINE VI magnitude(V x) {
    return (VI)x & 0x7fffffff;
}

/// What makes `limit` of the largest magnitude; 0 of zeros, so that they stay zeros.
GGFT_INLINE V inverse_scale(V largest, float limit) {
    return select(largest == V{}, V{}, splat(limit) / largest);
}

/// n <= I16_DEPTH floats as a block of integers, padded with zeros. Returns the scale.
GGFT_INLINE float quantize_i16(const float * x, int64_t n, float limit, int16_t * out) {
    alignas(64) float padded[I16_DEPTH];
    if (n < I16_DEPTH) {
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, x, (size_t)n * 4);
        x = padded;
    }
    VI most = {};
    GGFT_UNROLL for (int i = 0; i < I16_DEPTH; i += LANES) most =
        larger(most, magnitude(load(x + i)));
    const int32_t bits = largest_lane(most);
    const float largest = load_as<float>(&bits);
    const V inverse = inverse_scale(splat(largest), limit);
    GGFT_UNROLL for (int i = 0; i < I16_DEPTH; i += LANES)
        store_i16(out + i, to_integers(load(x + i) * inverse));
    return largest / limit;
}

/// n floats as blocks of integers, the last one padded with zeros, and the blocks' scales. `out`
/// may be the memory of x.
GGFT_INLINE void quantize_row_i16(const float * x, int64_t n, float limit, int16_t * out,
                                  float * scales) {
    for (int64_t k = 0; k < n; k += I16_DEPTH)
        scales[k / I16_DEPTH] = quantize_i16(x + k, std::min(I16_DEPTH, n - k), limit, out + k);
}

/// I16_DEPTH rows of `width` floats (a multiple of NR), `stride` apart, as one block of each panel;
/// most[i]: the largest magnitudes of columns i * LANES and on.
inline void quantize_panels_i16(const float * rows, int64_t stride, const VI * most, int64_t width,
                                float limit, int64_t panel_words, uint32_t * out) {
    for (int64_t j = 0; j < width; j += NR, out += panel_words) {
        float * scales = (float *)out + I16_STEPS * NR;
        V inverse[NV];
        GGFT_UNROLL for (int v = 0; v < NV; v++) {
            const V largest = (V)most[j / LANES + v];
            inverse[v] = inverse_scale(largest, limit);
            store(scales + v * LANES, largest * splat(1 / limit));
        }
        uint32_t * step = out;
        for (int64_t i = 0; i < I16_DEPTH; i += 2, step += NR) {
            const float * even = rows + i * stride + j;
            GGFT_UNROLL for (int v = 0; v < NV; v++) {
                const VI low = to_integers(load(even + v * LANES) * inverse[v]) & 0xffff;
                const VI high = to_integers(load(even + stride + v * LANES) * inverse[v]) << 16;
                const VI words = low | high;
                std::memcpy(step + v * LANES, &words, sizeof words);
            }
        }
    }
}

template <int M, int STRIDE> void tile_product_i16(const TileArgs & g) {
    float * y = g.y;
    bool add = g.add;
    if (g.low_steps) {
        V acc[M][NV];
        clear(acc);
        accumulate_low_rank<M>(acc, g);
        store_tile<M>(acc, g);
        add = true;
    }
    const uint32_t * block_panel = g.panel;
    for (int block = 0; block * I16_STEPS < g.steps; block++, block_panel += I16_PANEL_STEPS * NR) {
        const int from = block == 0 ? g.first_step : 0;
        const int to = std::min(I16_STEPS, g.steps - block * I16_STEPS);
        const uint32_t * rows = g.rows + block * I16_STEPS + from;
        const uint32_t * panel = block_panel + from * NR;
        VI acc[M][NV];
        GGFT_UNROLL for (int i = 0; i < M; i++) {
            GGFT_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = VI{};
        }
        for (int s = from; s < to; s++, rows++, panel += NR) {
            VI w[NV];
            GGFT_UNROLL for (int j = 0; j < NV; j++) w[j] = load_as<VI>(panel + j * LANES);
            GGFT_UNROLL for (int i = 0; i < M; i++) {
                const VI x = load_as<int32_t>(rows + i * STRIDE) - VI{};
                GGFT_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = dot_i16(acc[i][j], x, w[j]);
            }
        }
        V scale[NV];
        GGFT_UNROLL for (int j = 0; j < NV; j++) scale[j] =
            load_as<V>(block_panel + I16_STEPS * NR + j * LANES);
        GGFT_UNROLL for (int i = 0; i < M; i++) {
            const V row_scale = splat(g.row_scales[i * I16_BLOCKS + block]);
            GGFT_UNROLL for (int j = 0; j < NV; j++) {
                float * to = y + i * g.ldy + j * LANES;
                const V sum = to_floats(acc[i][j]) * row_scale;
                store(to, add ? fma(sum, scale[j], load(to)) : sum * scale[j]);
            }
        }
        add = true;
    }
}

template <int STRIDE, size_t... I> TileFunction tile_of_i16(int rows, std::index_sequence<I...>) {
    static constexpr TileFunction table[] = {tile_product_i16<(int)I + 1, STRIDE>...};
    return table[rows - 1];
}

#endif

} // namespace ggft
