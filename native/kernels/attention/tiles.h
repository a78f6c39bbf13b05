// What attention's forward and backward pass share: tile layouts and packing.
#pragma once

#include "kernels/attention/spans.h"
#include "kernels/gemm/panels.h"

namespace ggft::GGFT_ISA_NAMESPACE {

inline constexpr int64_t KEY_BLOCK = 256; // keys of a softmax block
/// Words between tile rows: MAX_HEAD_SIZE or KEY_BLOCK of them, plus a cache line.
inline constexpr int ROW_WORDS = HALF_STRIDE;
inline constexpr int64_t I16_DEPTH = I16Even::DEPTH;
static_assert(I16_BLOCKS * I16_DEPTH >= KEY_BLOCK && I16_BLOCKS * I16_DEPTH >= MAX_HEAD_SIZE);

// In attention_backward.cpp.
void attention_backward(Format format, const AttentionShape & s, const float * q, const float * k,
                        const float * v, const int32_t * start, const float * o, const float * lse,
                        const float * d_o, float * dq, float * dk, float * dv, int ith, int nth);
size_t attention_backward_scratch_bytes(Format format, const AttentionShape & s);

template <class F> TileFunction attention_tile(int64_t rows) {
    return tile_function<F, ROW_WORDS>((int)rows);
}

/// A set of head vectors: row i is at row(i), D floats.
struct HeadRows {
    const float * data;
    int64_t token_stride;
    int heads; // 1, or the heads of a query block: row i is token i / heads
    int head_size;
    const float * row(int64_t i) const {
        return data + i / heads * token_stride + i % heads * head_size;
    }
};

/// Where a tile's reduction begins and how long it is: indices [from, to) of rows and panels, both
/// given from index 0 on. `from` is a multiple of F::PER_WORD.
template <class F>
void reduce_over(TileArgs & g, const uint32_t * rows, const float * scales, const uint32_t * panel,
                 int64_t from, int64_t to) {
    constexpr int64_t per = F::PER_WORD;
    // Blocks of 16-bit integers are entered and left anywhere, but begin at their scales.
    const int64_t block = F::BLOCKED ? from / I16_DEPTH : 0;
    const int64_t start = F::BLOCKED ? block * I16_DEPTH : from;
    g.rows = rows + start / per;
    g.row_scales = scales + block;
    g.panel = panel + panel_steps<F>(start) * NR;
    g.first_step = (int)((from - start) / per);
    g.steps = (int)((to - start + per - 1) / per);
}

/// D as columns: whole panels.
GGFT_INLINE int64_t head_columns(int head_size) {
    return round_up(head_size, NR);
}

/// Rows of one head lie a token apart, which hardware prefetchers follow badly.
GGFT_INLINE void prefetch_row(const HeadRows & x, int64_t row, int64_t n_rows) {
    if (row >= n_rows)
        return;
    const float * p = x.row(row);
    for (int d = 0; d < x.head_size; d += 16)
        __builtin_prefetch(p + d);
}

/// n floats as words: themselves, BF16 pairs (the last one padded with 0), or blocks of 16-bit
/// integers, their scales to `scales`.
template <class F>
GGFT_INLINE void to_words(const float * from, int64_t n, uint32_t * words,
                          [[maybe_unused]] float * scales) {
    if constexpr (F::BLOCKED)
        quantize_row_i16<F>(from, n, F::ROW_LIMIT, (int16_t *)words, scales);
    else if constexpr (F::IS_BF16)
        store_bf16_pairs((uint16_t *)words, from, n);
    else
        std::memcpy(words, from, (size_t)n * 4);
}

/// Rows as tile rows of words, ROW_WORDS apart, and for 16-bit integers their scales, I16_BLOCKS
/// apart.
template <class F>
void pack_tile_rows(const HeadRows & x, int64_t n_rows, uint32_t * out, float * scales) {
    for (int64_t i = 0; i < n_rows; i++) {
        prefetch_row(x, i + 8, n_rows);
        to_words<F>(x.row(i), x.head_size, out + i * ROW_WORDS, scales + i * I16_BLOCKS);
    }
}

/// Panels with one column per row, reduction over D: [rows/NR][panel_steps(D)][NR]. Of K for q K',
/// of V for d_o V'.
template <class F> void pack_columns(const HeadRows & x, int64_t n_rows, uint32_t * out) {
    alignas(64) uint32_t rows[LANES * ROW_WORDS];
    float scales[LANES][I16_BLOCKS];
    const int64_t words = tile_steps<F>(x.head_size), steps = panel_steps<F>(x.head_size);
    for (int64_t r = 0; r < round_up(n_rows, NR); r += LANES) {
        for (int64_t i = 0; i < LANES; i++) {
            uint32_t * row = rows + i * ROW_WORDS;
            prefetch_row(x, r + i + LANES, n_rows);
            if (r + i < n_rows) {
                to_words<F>(x.row(r + i), x.head_size, row, scales[i]);
            } else {
                std::memset(row, 0, (size_t)words * 4);
                std::memset(scales[i], 0, sizeof scales[i]);
            }
        }
        transpose_rows<F>(rows, ROW_WORDS, x.head_size, scales[0], nullptr, I16_BLOCKS,
                          out + r / NR * steps * NR + r % NR);
    }
}

template <class F> void pack_depth_blocks(const HeadRows & x, int64_t n_rows, uint32_t * out) {
    constexpr int64_t WIDTH = MAX_HEAD_SIZE + NR;
    alignas(64) float rows[F::DEPTH * WIDTH];
    const int64_t width = head_columns(x.head_size), panel_words = panel_steps<F>(n_rows) * NR;
    for (int64_t first = 0; first < n_rows;
         first += F::DEPTH, out += panel_steps<F>(F::DEPTH) * NR) {
        VI most[WIDTH / LANES] = {};
        for (int64_t i = 0; i < F::DEPTH; i++) {
            float * row = rows + i * width;
            const int64_t n = first + i < n_rows ? x.head_size : 0;
            prefetch_row(x, first + i + 8, n_rows);
            if (n)
                std::memcpy(row, x.row(first + i), (size_t)n * 4);
            fill(row + n, row + width, 0.0f);
            for (int64_t c = 0; c < width; c += LANES)
                most[c / LANES] = larger(most[c / LANES], magnitude(load(row + c)));
        }
        quantize_panels_i16<F>(rows, width, F::DEPTH, most, width, panel_words, out);
    }
}

template <class F> void pack_depth_steps(const HeadRows & x, int64_t n_rows, uint32_t * out) {
    constexpr int64_t per = F::PER_WORD;
    const int64_t steps = (n_rows + per - 1) / per;
    alignas(64) float first[MAX_HEAD_SIZE + NR] = {}, second[MAX_HEAD_SIZE + NR] = {};
    for (int64_t s = 0; s < steps; s++) {
        std::memcpy(first, x.row(per * s), (size_t)x.head_size * 4);
        if (F::IS_BF16 && per * s + 1 < n_rows)
            std::memcpy(second, x.row(per * s + 1), (size_t)x.head_size * 4);
        else
            fill(second, second + x.head_size, 0.0f);
        for (int64_t c = 0; c < head_columns(x.head_size); c += LANES) {
            uint32_t * to = out + (c / NR * steps + s) * NR + c % NR;
            V words = load(first + c);
            if constexpr (F::IS_BF16)
                words = (V)pair_bf16(words, load(second + c));
            std::memcpy(to, &words, sizeof words);
        }
    }
}

/// Panels with one column per element of D, reduction over rows: [D/NR][panel_steps(rows)][NR]. Of
/// V for p V, of K for dS K, of q and d_o for dS' q and p' d_o.
template <class F> void pack_depth(const HeadRows & x, int64_t n_rows, uint32_t * out) {
    if constexpr (F::BLOCKED)
        pack_depth_blocks<F>(x, n_rows, out);
    else
        pack_depth_steps<F>(x, n_rows, out);
}

} // namespace ggft::GGFT_ISA_NAMESPACE
