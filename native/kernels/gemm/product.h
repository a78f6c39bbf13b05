// A matrix product and its blocking: which part of it a thread computes, and in which pieces.
#pragma once

#include "kernels/gemm/panels.h"

namespace ggft::GGFT_ISA_NAMESPACE {

inline constexpr int64_t SMALLEST_PIECE = 2 * NR; // columns that a thread takes at least
inline constexpr int64_t PACKED_TILES = 32;       // tiles of packed rows that are there beside them

/// A product out = x * panels, in one direction.
template <class F> struct Product {
    bool nt;
    const Weight & w;
    Rows x;
    const LowRank * low;
    Output y;
    int64_t n_tokens, n_cols, depth; // n_cols: of the output; depth: of the reduction

    Product(bool nt, const Weight & w, Rows x = {}, const LowRank * low = nullptr, Output y = {},
            int64_t n_tokens = 0)
        : nt(nt), w(w), x(x), low(low), y(y), n_tokens(n_tokens), n_cols(nt ? w.n_rows : w.n_cols),
          depth(nt ? w.n_cols : w.n_rows) {}

    int64_t block() const { return ggml_blck_size(w.type); }
    int64_t column_unit() const { return nt ? NR : max<int64_t>(NR, block()); }
    // Block sizes are powers of two, as these are, so that the larger is a multiple of both.
    int64_t depth_unit() const {
        // Packed rows do not know which weights they will meet: no type has longer blocks.
        if constexpr (F::BLOCKED)
            return F::DEPTH;
        else
            return nt ? max<int64_t>(32, block()) : 32;
    }
    /// Of a group of panels: what a tile row holds, or less, so that one unit of columns fits.
    int64_t max_depth() const {
        const int64_t fits = GROUP_WORDS / column_unit();
        if constexpr (F::BLOCKED)
            return min<int64_t>(I16_BLOCKS, fits / panel_steps<F>(F::DEPTH)) * F::DEPTH;
        else
            return min<int64_t>(MAX_STEPS, fits / 32 * 32) * F::PER_WORD;
    }
    /// What of the reduction is done at a time: even parts of up to max_depth().
    int64_t chunk() const {
        const int64_t parts = (depth + max_depth() - 1) / max_depth();
        return round_up((depth + parts - 1) / parts, depth_unit());
    }
    /// Rows of blocks are packed before the product.
    RowPacking packing() const { return F::BLOCKED ? row_packing(chunk(), depth) : RowPacking{}; }

    // Where its panels are when they are kept (kernels/gemm/prepacked.h): panel after panel of a
    // chunk of the reduction, chunk after chunk.
    int64_t panel_count() const { return (n_cols + NR - 1) / NR; }
    int64_t panel_index(int64_t c0, int64_t k0) const {
        return k0 / chunk() * panel_count() + c0 / NR;
    }
    int64_t panel_offset(int64_t c0, int64_t k0) const {
        const int64_t before = k0 / chunk() * panel_count() * panel_steps<F>(chunk());
        return (before + c0 / NR * panel_steps<F>(min(chunk(), depth - k0))) * NR;
    }
    PanelSize panel_size() const {
        const int64_t steps =
            depth / chunk() * panel_steps<F>(chunk()) + panel_steps<F>(depth % chunk());
        return {(size_t)round_up(panel_count() * NR * steps, 16),
                (size_t)panel_index(0, round_up(depth, chunk()))};
    }
};

/// Tokens and columns of thread `ith`: as many column ranges as threads, unless columns are so few
/// that splitting tokens, too, shortens the longest thread's work (dequantizing counts as
/// `unpack_tokens` tokens).
template <class F>
void choose_part(const Product<F> & p, int ith, int nth, Range & tokens, Range & columns) {
    const int64_t unpack_tokens = 24;
    const int64_t mr = TILE_ROWS<F>, tiles = (p.n_tokens + mr - 1) / mr;
    const int64_t units = (p.n_cols + p.column_unit() - 1) / p.column_unit();
    int best = 1;
    int64_t best_cost = INT64_MAX;
    for (int by_tokens = 1; by_tokens <= nth; by_tokens++) {
        if (nth % by_tokens)
            continue;
        const int64_t by_columns = nth / by_tokens;
        const int64_t cost = ((units + by_columns - 1) / by_columns) *
                             ((tiles + by_tokens - 1) / by_tokens * mr + unpack_tokens);
        if (cost < best_cost) {
            best = by_tokens;
            best_cost = cost;
        }
    }
    tokens = split_range(p.n_tokens, mr, ith % best, best);
    columns = split_range(p.n_cols, p.column_unit(), ith / best, nth / best);
}

} // namespace ggft::GGFT_ISA_NAMESPACE
