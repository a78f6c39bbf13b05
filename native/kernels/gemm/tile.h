// The one inner loop of every matrix product: a tile of MR rows x NR columns held in registers.
//
//   y[i][j] = (add ? y[i][j] : 0) + keep[i][j] * sum_r u[i][r] * B[r][j] + sum_k a[i][k] * P[k][j]
//
// The main reduction runs over `steps` 32-bit words: two BF16 (product and sum in F32) or one F32.
// Rows of `a` are a constant number of words apart; panels hold NR words per step, so that both
// operands are read forward. The low-rank part (LoRA's up-projection) is F32 and needs no pass of
// its own.
#pragma once

#include "kernels/gemm/format.h"

namespace ggft::GGFT_ISA_NAMESPACE {

struct TileArgs {
    const uint32_t * rows;  // [M] rows, STRIDE words apart
    const uint32_t * panel; // [steps][NR]
    int steps;
    // Of 16-bit integers only (kernels/gemm/tile_i16.h, kernels/gemm/tile_winograd.h): scales and
    // pair sums of the rows' blocks, I16_BLOCKS apart, and steps of the first block to leave out.
    const float * row_scales;
    const int32_t * row_pairs;
    int first_step;
    const float * low_rows; // u: [M] rows, low_stride floats apart
    int64_t low_stride;
    const float * low_panel; // B: [low_steps][NR]
    int low_steps;           // 0: no low-rank part
    const float * keep;      // [M][NR], or null for all ones
    float * y;               // [M] rows, ldy floats apart
    int64_t ldy;
    bool add;
};

template <int M> GGFT_INLINE void clear(V (&acc)[M][NV]) {
    GGFT_UNROLL for (int i = 0; i < M; i++) {
        GGFT_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = V{};
    }
}

/// acc += sum over steps of rows[i][s] * panel[s][j]; `stride` words between rows.
template <class F, int M>
GGFT_INLINE void accumulate(V (&acc)[M][NV], const uint32_t * rows, int64_t stride,
                            const uint32_t * panel, int steps) {
    for (int s = 0; s < steps; s++, rows++, panel += NR) {
        V w[NV];
        GGFT_UNROLL for (int j = 0; j < NV; j++) w[j] = load_as<V>(panel + j * LANES);
        GGFT_UNROLL for (int i = 0; i < M; i++) {
            const V x = splat(load_as<float>(rows + i * stride));
            GGFT_UNROLL for (int j = 0; j < NV; j++) {
                acc[i][j] = F::IS_BF16 ? dot_bf16(acc[i][j], x, w[j]) : fma(x, w[j], acc[i][j]);
            }
        }
    }
}

/// acc += keep * sum_r u[i][r] * B[r][j].
template <int M> GGFT_INLINE void accumulate_low_rank(V (&acc)[M][NV], const TileArgs & g) {
    accumulate<F32, M>(acc, (const uint32_t *)g.low_rows, g.low_stride,
                       (const uint32_t *)g.low_panel, g.low_steps);
    if (g.keep) {
        GGFT_UNROLL for (int i = 0; i < M; i++) {
            GGFT_UNROLL for (int j = 0; j < NV; j++) acc[i][j] *= load(g.keep + i * NR + j * LANES);
        }
    }
}

template <int M> GGFT_INLINE void store_tile(const V (&acc)[M][NV], const TileArgs & g) {
    float * y = g.y;
    GGFT_UNROLL for (int i = 0; i < M; i++, y += g.ldy) {
        GGFT_UNROLL for (int j = 0; j < NV; j++) {
            store(y + j * LANES, g.add ? load(y + j * LANES) + acc[i][j] : acc[i][j]);
        }
    }
}

template <class F, int M, int STRIDE> void tile_product(const TileArgs & g) {
    V acc[M][NV];
    clear(acc);
    if (g.low_steps)
        accumulate_low_rank(acc, g);
    accumulate<F, M>(acc, g.rows, STRIDE, g.panel, g.steps);
    store_tile(acc, g);
}

} // namespace ggft::GGFT_ISA_NAMESPACE
