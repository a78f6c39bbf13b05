// Panels: blocks of a weight, dequantized and laid out for kernels_micro.h and kernels_i16.h.
//
// A panel holds NR output columns and consecutive reduction steps as 32-bit words [step][NR]: one
// F32, two BF16 of consecutive reduction indices, or two 16-bit integers of them and after each
// block a step of scales. nt: columns are rows of W; nn: columns are columns of W.
#pragma once

#include "kernels_gemm.h"
#include "kernels_i16.h"
#include "kernels_micro.h"

namespace ggft {

/// How a product holds its factors.
enum class Format { f32, bf16, i16 };

/// What `precision` means on this machine.
inline constexpr Format format_of(Precision precision) {
    if (precision == Precision::f32)
        return Format::f32;
    return HAS_BF16 ? Format::bf16 : HAS_I16 ? Format::i16 : Format::f32;
}

/// Reduction indices per word.
inline constexpr int64_t per_word(Format format) {
    return format == Format::f32 ? 1 : 2;
}

/// Steps of a tile's reduction over kc indices: words of a tile row.
inline constexpr int64_t tile_steps(Format format, int64_t kc) {
    if (format == Format::i16)
        return (kc + I16_DEPTH - 1) / I16_DEPTH * I16_STEPS;
    return (kc + per_word(format) - 1) / per_word(format);
}

/// Steps of a panel of kc indices, those of scales included.
inline constexpr int64_t panel_steps(Format format, int64_t kc) {
    const int64_t steps = tile_steps(format, kc);
    return format == Format::i16 ? steps / I16_STEPS * I16_PANEL_STEPS : steps;
}

/// The tile for `rows` in 1..MR.
template <int STRIDE = TILE_STRIDE> TileFunction tile_of_format(Format format, int rows) {
#if defined(GGFT_I16)
    if (format == Format::i16)
        return tile_of_i16<STRIDE>(rows, std::make_index_sequence<MR>());
#endif
    return tile_function<STRIDE>(format == Format::bf16, rows);
}

/// Columns [c0, c0+nc) and reduction indices [k0, k0+kc) of W, panel after panel. Columns and
/// indices past the end of W are zero. k0 and, for nn, c0 are multiples of the block size; k0 is
/// one of I16_DEPTH, too, for that format. One thread.
void pack_panels_nt(Format format, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    uint32_t * out);
void pack_panels_nn(Format format, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    uint32_t * out);

/// Rows [t0, t0+rows), columns [k0, k0+kc) of x as tile rows of words, TILE_STRIDE apart, and for
/// i16 their scales, I16_BLOCKS apart.
void pack_rows(Format format, const Rows & x, int64_t t0, int rows, int64_t k0, int64_t kc,
               uint32_t * out, float * scales);

/// out[j][i] = in[i][j] for LANES rows `in_stride` apart and `steps` columns of words.
void transpose_words(const uint32_t * in, int64_t in_stride, int64_t steps, uint32_t * out,
                     int64_t out_stride);

} // namespace ggft
