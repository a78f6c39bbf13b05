// A matrix product and its blocking: which part of it a thread computes, and in which pieces.
#pragma once

#include <algorithm>

#include "kernels/gemm/panels.h"

namespace ggft {

// Panels that are in the L2 cache together: 768 KB; 384 KB where L2 caches are small.
#if defined(GGFT_AVX512) || defined(__aarch64__)
inline constexpr int64_t GROUP_WORDS = 192 << 10;
#else
inline constexpr int64_t GROUP_WORDS = 96 << 10;
#endif
inline constexpr int64_t SMALLEST_PIECE = 2 * NR; // columns that a thread takes at least
inline constexpr int64_t PACKED_TILES = 32;       // tiles of packed rows that are there beside them

/// A product out = x * panels, in one direction.
struct Product {
    Format format;
    bool nt;
    const Weight & w;
    Rows x;
    const LowRank * low;
    Output y;
    int64_t n_tokens, n_cols, depth; // n_cols: of the output; depth: of the reduction

    /// Without rows and output.
    static Product forward(Precision precision, const Weight & w) {
        return {format_of(precision), true, w, {}, nullptr, {}, 0, w.n_rows, w.n_cols};
    }
    static Product backward(Precision precision, const Weight & w) {
        return {format_of(precision), false, w, {}, nullptr, {}, 0, w.n_cols, w.n_rows};
    }
    RowPacking packing() const { return {packed() ? chunk() : 0, depth}; }

    int64_t block() const { return ggml_blck_size(w.type); }
    bool packed() const { return format == Format::i16; } // rows, before the product
    int64_t column_unit() const { return nt ? NR : std::max<int64_t>(NR, block()); }
    // Block sizes are powers of two, as these are, so that the larger is a multiple of both.
    int64_t depth_unit() const {
        // Packed rows do not know which weights they will meet: no type has longer blocks.
        if (packed())
            return blocks_of(format).depth;
        return nt ? std::max<int64_t>(32, block()) : 32;
    }
    /// Of a group of panels: what a tile row holds, or less, so that one unit of columns fits.
    int64_t max_depth() const {
        const int64_t fits = GROUP_WORDS / column_unit();
        if (packed()) {
            const int64_t depth = blocks_of(format).depth;
            return std::min<int64_t>(I16_BLOCKS, fits / panel_steps(format, depth)) * depth;
        }
        return std::min<int64_t>(MAX_STEPS, fits / 32 * 32) * per_word(format);
    }
    /// What of the reduction is done at a time: even parts of up to max_depth().
    int64_t chunk() const {
        const int64_t parts = (depth + max_depth() - 1) / max_depth();
        return round_up((depth + parts - 1) / parts, depth_unit());
    }
};

/// Tokens and columns of thread `ith`: as many column ranges as threads, unless columns are so few
/// that splitting tokens, too, shortens the longest thread's work (dequantizing counts as
/// `unpack_tokens` tokens).
inline void choose_part(const Product & p, int ith, int nth, Range & tokens, Range & columns) {
    const int64_t unpack_tokens = 24;
    const int64_t mr = tile_rows(p.format), tiles = (p.n_tokens + mr - 1) / mr;
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

} // namespace ggft
