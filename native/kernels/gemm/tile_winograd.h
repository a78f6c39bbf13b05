// The tile of kernels/gemm/tile_i16.h with half as many multiplications: Winograd's inner product
// (1968).
//
//   x0 y0 + x1 y1 = (x0 + y1) (x1 + y0) - x0 x1 - y0 y1
//
// The last two terms belong to one factor each: their sums over a block, the pair sums, are
// computed once for a row and once for a column, and what remains in the tile is one multiplication
// and one more addition for two products. On integers this is exact: sums of two factors fit into
// 16 bits, and what overflows in 32 bits comes back when the pair sums are subtracted, as all of it
// is arithmetic modulo 2^32.
//
// Here x0 and x1 are the words of two consecutive steps, two products each. On x86 processors of
// 256 bits without VNNI, fewer execution units multiply (vpmaddwd) than add: two of four on Zen 3.
#pragma once

#include "kernels/gemm/tile_i16.h"

namespace ggft::GGFT_ISA_NAMESPACE {

/// Rows of a tile. Its sums, two steps of a panel and their sums with x fill 16 registers.
inline constexpr int WINOGRAD_ROWS = 4;

/// Sums of 16-bit integers, modulo 2^16.
GGFT_INLINE VI add_i16(VI a, VI b) {
    typedef uint16_t Halves __attribute__((vector_size(LANES * 4)));
    return (VI)((Halves)a + (Halves)b);
}

/// Minus the sum of x0 x1 over a row's block of `words`, a multiple of LANES.
GGFT_INLINE int32_t pair_sum(const uint32_t * words, int64_t n_words) {
    typedef uint64_t Pairs __attribute__((vector_size(LANES * 4)));
    VI sums = {};
    for (int64_t i = 0; i < n_words; i += LANES) {
        const VI x = load_as<VI>(words + i);
        sums = dot_i16(sums, x, (VI)((Pairs)x >> 32)); // odd words are left with zeros
    }
    uint32_t total = 0;
    for (int i = 0; i < LANES; i++)
        total += (uint32_t)sums[i];
    return (int32_t)-total;
}

/// Whole blocks only: first_step must be 0.
template <class F, int M, int STRIDE> void tile_product_winograd(const TileArgs & g) {
    constexpr int STEPS = (int)BLOCK_STEPS<F>, HEADER = (int)F::HEADER;
    // Copies: y might be anywhere, also in g.
    const TileArgs t = g;
    bool add = begin_tile_i16<M>(g);
    const uint32_t * header = t.panel;
    for (int block = 0; block * STEPS < t.steps; block++, header += (HEADER + STEPS) * NR) {
        const uint32_t * rows = t.rows + block * STEPS;
        const uint32_t * panel = header + HEADER * NR;
        const int steps = min(STEPS, t.steps - block * STEPS);
        VI acc[M][NV];
        GGFT_UNROLL for (int i = 0; i < M; i++) {
            const VU pairs = (uint32_t)t.row_pairs[i * I16_BLOCKS + block] - VU{};
            GGFT_UNROLL for (int j = 0; j < NV; j++) acc[i][j] =
                (VI)(pairs + load_as<VU>(header + NR + j * LANES));
        }
        for (int s = 0; s < steps; s += 2, rows += 2, panel += 2 * NR) {
            VI y0[NV], y1[NV];
            GGFT_UNROLL for (int j = 0; j < NV; j++) {
                y0[j] = in_register(load_as<VI>(panel + j * LANES));
                y1[j] = in_register(load_as<VI>(panel + NR + j * LANES));
            }
            GGFT_UNROLL for (int i = 0; i < M; i++) {
                const VI x0 = load_as<int32_t>(rows + i * STRIDE) - VI{};
                const VI x1 = load_as<int32_t>(rows + i * STRIDE + 1) - VI{};
                GGFT_UNROLL for (int j = 0; j < NV; j++) acc[i][j] =
                    dot_i16(acc[i][j], add_i16(x0, y1[j]), add_i16(x1, y0[j]));
            }
        }
        end_block_i16<M>(acc, t.row_scales + block, header, t.y, t.ldy, add);
        add = true;
    }
}

/// n floats as blocks of 16-bit integers up to `limit`, their scales, and their pair sums where the
/// format has them.
template <class F>
void quantize_with_pairs(const float * x, int64_t n, float limit, uint32_t * out, float * scales,
                         [[maybe_unused]] int32_t * pairs) {
    quantize_row_i16<F>(x, n, limit, (int16_t *)out, scales);
    if constexpr (F::PAIR_SUMS) {
        const int64_t end = tile_steps<F>(n);
        for (int64_t s = 0; s < end; s += BLOCK_STEPS<F>)
            pairs[s / BLOCK_STEPS<F>] = pair_sum(out + s, min(BLOCK_STEPS<F>, end - s));
    }
}

} // namespace ggft::GGFT_ISA_NAMESPACE
