// Panels and tile rows: the factors of a product as the register tiles read them.
//
//   tile row                   word 0    word 1    …    word steps-1
//     F32                      [ k=0  ]  [ k=1  ]
//     BF16, 16-bit integers    [ 0  1 ]  [ 2  3 ]       the first in the lower half
//
//   panel                      column 0   1   …   NR-1
//     step 0                   [ word ][ word ]…[ word ]    words as in a tile row
//     step 1                   [ word ][ word ]…[ word ]
//     …
//
//   panel of 16-bit integers, a block of DEPTH indices after the other:
//                              [ scale ][ scale ]…[ scale ]
//     if PAIR_SUMS             [ -sum ][ -sum ]…[ -sum ]    (kernels/gemm/tile_winograd.h)
//     DEPTH/2 steps            [ word ][ word ]…[ word ]
//
// Columns of a panel are rows of W (nt) or columns of W (nn). The panels of a group of columns
// follow one another, panel_steps() * NR words apart. Blocks of a tile row have their scales and
// pair sums beside the row, I16_BLOCKS apart.
#pragma once

#include "kernels/gemm/gemm.h"
#include "kernels/gemm/tile_winograd.h"

namespace ggft::GGFT_ISA_NAMESPACE {

/// Whether products with weights take the tile of kernels/gemm/tile_winograd.h.
template <class F> GGFT_INLINE constexpr bool is_winograd() {
    if constexpr (F::BLOCKED)
        return F::PAIR_SUMS;
    else
        return false;
}

/// Rows of the tallest tile.
template <class F> inline constexpr int TILE_ROWS = is_winograd<F>() ? WINOGRAD_ROWS : MR;

using TileFunction = void (*)(const TileArgs &);

template <class F, int M, int STRIDE> constexpr TileFunction tile_of() {
    if constexpr (is_winograd<F>())
        return tile_product_winograd<F, M, STRIDE>;
    else if constexpr (F::BLOCKED)
        return tile_product_i16<F, M, STRIDE>;
    else
        return tile_product<F, M, STRIDE>;
}

template <class F, int STRIDE> struct Tiles {
    TileFunction of[TILE_ROWS<F>] = {};

    constexpr Tiles() { set<1>(); }
    template <int M> constexpr void set() {
        of[M - 1] = tile_of<F, M, STRIDE>();
        if constexpr (M < TILE_ROWS<F>)
            set<M + 1>();
    }
};

/// The tile for `rows` in 1..TILE_ROWS, whose rows are STRIDE words apart.
template <class F, int STRIDE> TileFunction tile_function(int rows) {
    static constexpr Tiles<F, STRIDE> tiles;
    return tiles.of[rows - 1];
}

/// Elements of a row of W that are dequantized at once: no less than the largest block of all
/// types.
inline constexpr int64_t PANEL_CHUNK = 256;
/// Floats that pack_panels_nn works with: too many for the stack of every thread.
inline constexpr int64_t PANEL_WORK = HAS_I16 ? I16::DEPTH * PANEL_CHUNK : 0;

/// Columns [c0, c0+nc) and reduction indices [k0, k0+kc) of W, panel after panel. Columns and
/// indices past the end of W are zero. k0 and, for nn, c0 are multiples of the block size; k0 is
/// one of I16's blocks, too, for that format. One thread.
void pack_panels_nt(Format format, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    uint32_t * out);
void pack_panels_nn(Format format, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    float * work, uint32_t * out);

/// Rows [t0, t0+rows), columns [k0, k0+kc) of x as tile rows of F32 or BF16, TILE_STRIDE apart.
void pack_rows(Format format, const Rows & x, int64_t t0, int rows, int64_t k0, int64_t kc,
               uint32_t * out);

/// All rows of x as `packing` says.
void pack_tokens(const RowPacking & packing, Rows x, int64_t n_tokens, void * out, int ith,
                 int nth);

/// How rows of 16-bit integers are packed, of which `chunk` reduction indices lie together.
RowPacking row_packing(int64_t chunk, int64_t depth);

/// Packed rows of 16-bit integers in memory: of each chunk of the reduction all rows, `stride`
/// words apart, then their blocks' scales, then these' pair sums, I16_BLOCKS apart.
struct PackedRows {
    RowPacking packing;
    uint32_t * data;
    int64_t n_tokens;

    /// Words of row t where reduction index k0, a chunk's first, begins.
    uint32_t * words(int64_t t, int64_t k0) const { return data + row(t, k0) * packing.stride; }
    float * scales(int64_t t, int64_t k0) const {
        return (float *)(data + rows() * packing.stride) + row(t, k0) * I16_BLOCKS;
    }
    int32_t * pairs(int64_t t, int64_t k0) const {
        return (int32_t *)(data + rows() * (packing.stride + I16_BLOCKS)) + row(t, k0) * I16_BLOCKS;
    }
    int64_t rows() const { return (packing.depth + packing.chunk - 1) / packing.chunk * n_tokens; }
    int64_t row(int64_t t, int64_t k0) const { return k0 / packing.chunk * n_tokens + t; }
};

/// LANES tile rows of `kc` indices, `stride` words apart, as columns of a panel. Of 16-bit integers
/// the blocks' scales and pair sums lie `blocks` apart.
template <class F>
void transpose_rows(const uint32_t * rows, int64_t stride, int64_t kc, const float * scales,
                    [[maybe_unused]] const int32_t * pairs, int64_t blocks, uint32_t * out) {
    const int64_t words = tile_steps<F>(kc);
    if constexpr (F::BLOCKED) {
        for (int64_t s = 0, i = 0; s < words; s += BLOCK_STEPS<F>, i++) {
            const int64_t n = min(BLOCK_STEPS<F>, words - s);
            for (int l = 0; l < LANES; l++) {
                std::memcpy(out + l, scales + l * blocks + i, 4);
                if constexpr (F::PAIR_SUMS)
                    std::memcpy(out + NR + l, pairs + l * blocks + i, 4);
            }
            out += F::HEADER * NR;
            transpose_words(rows + s, stride, n, out, NR);
            out += n * NR;
        }
    } else {
        transpose_words(rows, stride, words, out, NR);
    }
}

} // namespace ggft::GGFT_ISA_NAMESPACE
