// Products of 16-bit integers with a scale per block: the fast path of machines that have no BF16
// dot product. One multiply-add of pairs (vpmaddwd) does twice the work of an F32 fused
// multiply-add, and the factors keep more bits than BF16's eight.
//
// Both factors are cut into blocks of reduction indices, for each row of x and each column of the
// panel. A block is its largest magnitude over the limit as F32 scale, and integers up to the limit
// (I16 and I16Even in kernels/gemm/format.h). A block with a NaN or an infinity has that scale, so
// that it shows in y.
#pragma once

#include "kernels/gemm/tile.h"

namespace ggft::GGFT_ISA_NAMESPACE {

/// Magnitudes as integers: these order as floats do, with infinities and NaN above all.
GGFT_INLINE VI magnitude(V x) {
    return (VI)x & 0x7fffffff;
}

/// What makes `limit` of the largest magnitude; 0 of zeros, so that they stay zeros.
GGFT_INLINE V inverse_scale(V largest, float limit) {
    return select(largest == V{}, V{}, splat(limit) / largest);
}

/// n floats, one block or less, as integers up to `limit`, padded with zeros to a multiple of
/// I16_PADDING. Returns the scale.
template <class F> float quantize_i16(const float * x, int64_t n, float limit, int16_t * out) {
    alignas(64) float padded[F::DEPTH];
    const int64_t end = round_up(n, I16_PADDING);
    if (n < end) {
        std::memcpy(padded, x, (size_t)n * 4);
        fill(padded + n, padded + end, 0.0f);
        x = padded;
    }
    VI most = {};
    for (int64_t k = 0; k < end; k += I16_PADDING) {
        GGFT_UNROLL for (int i = 0; i < I16_PADDING; i += LANES) most =
            larger(most, magnitude(load(x + k + i)));
    }
    const int32_t bits = largest_lane(most);
    const float largest = load_as<float>(&bits);
    const V inverse = inverse_scale(splat(largest), limit);
    for (int64_t k = 0; k < end; k += I16_PADDING) {
        GGFT_UNROLL for (int i = 0; i < I16_PADDING; i += LANES)
            store_i16(out + k + i, to_integers(load(x + k + i) * inverse));
    }
    return largest / limit;
}

/// n floats as blocks of integers, the last one padded with zeros, and the blocks' scales. `out`
/// may be the memory of x.
template <class F>
void quantize_row_i16(const float * x, int64_t n, float limit, int16_t * out, float * scales) {
    constexpr int64_t depth = F::DEPTH;
    for (int64_t k = 0; k < n; k += depth)
        scales[k / depth] = quantize_i16<F>(x + k, min(depth, n - k), limit, out + k);
}

/// n rows (a multiple of I16_PADDING, one block or less) of `width` floats (a multiple of NR),
/// `stride` apart, as one block of each panel; most[i]: the largest magnitudes of columns i * LANES
/// and on.
template <class F>
void quantize_panels_i16(const float * rows, int64_t stride, int64_t n, const VI * most,
                         int64_t width, int64_t panel_words, uint32_t * out) {
    const float limit = F::PANEL_LIMIT;
    for (int64_t j = 0; j < width; j += NR, out += panel_words) {
        V inverse[NV];
        GGFT_UNROLL for (int v = 0; v < NV; v++) {
            const V largest = (V)most[j / LANES + v];
            inverse[v] = inverse_scale(largest, limit);
            store((float *)out + v * LANES, largest * splat(1 / limit));
        }
        uint32_t * step = out + F::HEADER * NR;
        const float * even = rows + j;
        VI pairs[NV] = {};
        for (int64_t i = 0; i < n; i += 4) {
            VI words[2][NV];
            for (int s = 0; s < 2; s++, step += NR, even += 2 * stride) {
                GGFT_UNROLL for (int v = 0; v < NV; v++) {
                    const V low = load(even + v * LANES), high = load(even + stride + v * LANES);
                    words[s][v] = (to_integers(low * inverse[v]) & 0xffff) |
                                  (to_integers(high * inverse[v]) << 16);
                    std::memcpy(step + v * LANES, &words[s][v], sizeof(VI));
                }
            }
            if constexpr (F::PAIR_SUMS) {
                GGFT_UNROLL for (int v = 0; v < NV; v++) pairs[v] =
                    dot_i16(pairs[v], words[0][v], words[1][v]);
            }
        }
        if constexpr (F::PAIR_SUMS) {
            GGFT_UNROLL for (int v = 0; v < NV; v++) pairs[v] = (VI) - (VU)pairs[v];
            std::memcpy(out + NR, pairs, sizeof pairs);
        }
    }
}

/// The low-rank part of a tile of 16-bit integers. Returns whether what follows adds to y.
template <int M> GGFT_INLINE bool begin_tile_i16(const TileArgs & g) {
    if (g.low_steps == 0)
        return g.add;
    V acc[M][NV];
    clear(acc);
    accumulate_low_rank<M>(acc, g);
    store_tile<M>(acc, g);
    return true;
}

/// A block's sums, scaled, to y.
template <int M>
GGFT_INLINE void end_block_i16(const VI (&acc)[M][NV], const float * row_scales,
                               const uint32_t * header, float * y, int64_t ldy, bool add) {
    V scale[NV];
    GGFT_UNROLL for (int j = 0; j < NV; j++) scale[j] = load_as<V>(header + j * LANES);
    if (add) {
        GGFT_UNROLL for (int i = 0; i < M; i++) {
            const V row_scale = splat(row_scales[i * I16_BLOCKS]);
            GGFT_UNROLL for (int j = 0; j < NV; j++) {
                float * to = y + i * ldy + j * LANES;
                store(to, fma(to_floats(acc[i][j]) * row_scale, scale[j], load(to)));
            }
        }
    } else {
        GGFT_UNROLL for (int i = 0; i < M; i++) {
            const V row_scale = splat(row_scales[i * I16_BLOCKS]);
            GGFT_UNROLL for (int j = 0; j < NV; j++)
                store(y + i * ldy + j * LANES, to_floats(acc[i][j]) * row_scale * scale[j]);
        }
    }
}

template <class F, int M, int STRIDE> void tile_product_i16(const TileArgs & g) {
    constexpr int STEPS = (int)BLOCK_STEPS<F>, HEADER = (int)F::HEADER;
    // Copies: y might be anywhere, also in g.
    const TileArgs t = g;
    bool add = begin_tile_i16<M>(g);
    const uint32_t * header = t.panel;
    for (int block = 0; block * STEPS < t.steps; block++, header += (HEADER + STEPS) * NR) {
        const int from = block == 0 ? t.first_step : 0;
        const int to = min(STEPS, t.steps - block * STEPS);
        const uint32_t * rows = t.rows + block * STEPS + from;
        const uint32_t * panel = header + (HEADER + from) * NR;
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
        end_block_i16<M>(acc, t.row_scales + block, header, t.y, t.ldy, add);
        add = true;
    }
}

} // namespace ggft::GGFT_ISA_NAMESPACE
