// Panels: blocks of a weight, dequantized and laid out for kernels_micro.h.
//
// A panel holds NR output columns and consecutive reduction steps as 32-bit words [step][NR]: one
// F32, or two BF16 of consecutive reduction indices. nt: columns are rows of W; nn: columns are
// columns of W.
#pragma once

#include "kernels_gemm.h"
#include "kernels_micro.h"

namespace ggft {

/// Reduction indices per word.
inline constexpr int64_t per_word(bool bf16) {
    return bf16 ? 2 : 1;
}

/// Columns [c0, c0+nc) and reduction indices [k0, k0+kc) of W, panel after panel, each of
/// panel_steps steps (>= those of kc; the rest is left alone). Columns and indices past the end of
/// W are zero. k0 and, for nn, c0 are multiples of the block size. One thread.
void pack_panels_nt(bool bf16, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    int64_t panel_steps, uint32_t * out);
void pack_panels_nn(bool bf16, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    int64_t panel_steps, uint32_t * out);

/// Rows [t0, t0+rows), columns [k0, k0+kc) of x as tile rows of words, TILE_STRIDE apart.
void pack_rows(bool bf16, const Rows & x, int64_t t0, int rows, int64_t k0, int64_t kc,
               uint32_t * out);

/// out[j][i] = in[i][j] for LANES rows `in_stride` apart and `steps` columns of words.
void transpose_words(const uint32_t * in, int64_t in_stride, int64_t steps, uint32_t * out,
                     int64_t out_stride);

} // namespace ggft
