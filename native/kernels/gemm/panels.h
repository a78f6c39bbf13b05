// Panels: blocks of a weight, dequantized and laid out for the register tiles
// (kernels/gemm/format.h describes the layouts). nt: columns are rows of W; nn: columns are columns
// of W. And tile rows.
#pragma once

#include "kernels/gemm/format.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/tile_i16.h"
#include "kernels/gemm/tile_winograd.h"

namespace ggft {

/// Rows of the tallest tile for products with weights.
inline constexpr int tile_rows([[maybe_unused]] Format format) {
#if defined(GGFT_WINOGRAD)
    if (format == Format::i16)
        return WINOGRAD_ROWS;
#endif
    return MR;
}

#if defined(GGFT_I16)
template <Format FORMAT, int STRIDE, size_t... I>
TileFunction tile_of_i16(int rows, std::index_sequence<I...>) {
#if defined(GGFT_WINOGRAD)
    if constexpr (FORMAT == Format::i16) {
        static constexpr TileFunction table[] = {tile_product_winograd<(int)I + 1, STRIDE>...};
        return table[rows - 1];
    }
#endif
    static constexpr TileFunction table[] = {tile_product_i16<(int)I + 1, STRIDE, FORMAT>...};
    return table[rows - 1];
}
#endif

/// The tile for `rows` in 1..tile_rows(format).
template <Format I16, int STRIDE> TileFunction tile_of_format(Format format, int rows) {
#if defined(GGFT_I16)
    if (format == I16)
        return tile_of_i16<I16, STRIDE>(rows, std::make_index_sequence<tile_rows(I16)>());
#endif
    return tile_function<STRIDE>(format == Format::bf16, rows);
}

/// Elements of a row of W that are dequantized at once: no less than the largest block of all
/// types.
inline constexpr int64_t PANEL_CHUNK = 256;
/// Floats that pack_panels_nn works with: too many for the stack of every thread.
inline constexpr int64_t PANEL_WORK = HAS_I16 ? blocks_of(Format::i16).depth * PANEL_CHUNK : 0;

/// Columns [c0, c0+nc) and reduction indices [k0, k0+kc) of W, panel after panel. Columns and
/// indices past the end of W are zero. k0 and, for nn, c0 are multiples of the block size; k0 is
/// one of i16's blocks, too, for that format. One thread.
void pack_panels_nt(Format format, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    uint32_t * out);
void pack_panels_nn(Format format, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    float * work, uint32_t * out);

/// Rows [t0, t0+rows), columns [k0, k0+kc) of x as tile rows of F32 or BF16, TILE_STRIDE apart.
void pack_rows(Format format, const Rows & x, int64_t t0, int rows, int64_t k0, int64_t kc,
               uint32_t * out);

/// Packed rows of 16-bit integers (RowPacking) in memory: of each chunk of the reduction all rows,
/// stride() words apart, then their blocks' scales, then these' pair sums, I16_BLOCKS apart.
struct PackedRows {
    RowPacking packing;
    uint32_t * data;
    int64_t n_tokens;

    /// Words of row t where reduction index k0, a chunk's first, begins.
    uint32_t * words(int64_t t, int64_t k0) const { return data + row(t, k0) * packing.stride(); }
    float * scales(int64_t t, int64_t k0) const {
        return (float *)(data + rows() * packing.stride()) + row(t, k0) * I16_BLOCKS;
    }
    int32_t * pairs(int64_t t, int64_t k0) const {
        return (int32_t *)(data + rows() * (packing.stride() + I16_BLOCKS)) +
               row(t, k0) * I16_BLOCKS;
    }
    int64_t rows() const { return packing.chunks() * n_tokens; }
    int64_t row(int64_t t, int64_t k0) const { return k0 / packing.chunk * n_tokens + t; }
};

/// LANES tile rows of `kc` indices, `stride` words apart, as columns of a panel. Of 16-bit integers
/// the blocks' scales and pair sums lie `blocks` apart.
void transpose_rows(Format format, const uint32_t * rows, int64_t stride, int64_t kc,
                    const float * scales, const int32_t * pairs, int64_t blocks, uint32_t * out);

/// out[j][i] = in[i][j] for LANES rows `in_stride` apart and `steps` columns of words.
void transpose_words(const uint32_t * in, int64_t in_stride, int64_t steps, uint32_t * out,
                     int64_t out_stride);

} // namespace ggft
