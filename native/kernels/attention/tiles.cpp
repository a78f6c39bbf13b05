#include "kernels/attention/tiles.h"

#include <algorithm>

namespace ggft::attention_detail {
namespace {

constexpr int64_t SMALL = 64; // shorter examples of a row are joined into units of this many tokens

struct Piece {
    int64_t first, last;
    double cost; // query-key pairs, plus something per token
};

std::vector<Piece> pieces_of(const AttentionShape & s, const int32_t * start) {
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < s.n_tokens; i++) {
        const bool starts_row = i % s.row_tokens == 0, starts_example = start[i] == i;
        if (starts_row || (starts_example && i - pieces.back().first >= SMALL)) {
            pieces.push_back({i, i, 0});
        }
        pieces.back().last = i + 1;
        pieces.back().cost += (double)(i - start[i]) + 32;
    }
    return pieces;
}

} // namespace

std::vector<Unit> plan_units(const AttentionShape & s, const int32_t * start, int ith, int nth) {
    std::vector<Piece> pieces = pieces_of(s, start);
    std::stable_sort(pieces.begin(), pieces.end(),
                     [](const Piece & a, const Piece & b) { return a.cost > b.cost; });
    double total = 0;
    for (const Piece & p : pieces)
        total += p.cost * s.n_head_kv;
    std::vector<double> load((size_t)nth);
    std::vector<Unit> mine;
    for (const Piece & p : pieces) {
        for (int h = 0; h < s.n_head_kv; h++) {
            const size_t least =
                (size_t)(std::min_element(load.begin(), load.end()) - load.begin());
            const bool shared = load[least] + p.cost > 1.05 * total / nth;
            if (shared) {
                for (double & l : load)
                    l += p.cost / nth;
            } else {
                load[least] += p.cost;
            }
            if (shared || least == (size_t)ith)
                mine.push_back({p.first, p.last, h, shared});
        }
    }
    return mine;
}

std::vector<QueryBlock> query_blocks(const AttentionShape & s, const Unit & unit) {
    const int group = s.n_head / s.n_head_kv;
    const int heads = (int)std::min<int64_t>(group, ROWS);
    const int64_t tokens = ROWS / heads;
    std::vector<QueryBlock> blocks;
    for (int64_t t = unit.first; t < unit.last; t += tokens) {
        for (int g = 0; g < group; g += heads) {
            blocks.push_back({t, std::min(t + tokens, unit.last), unit.head_kv * group + g,
                              std::min(heads, group - g)});
        }
    }
    return blocks;
}

void seen_keys(const QueryBlock & block, const int32_t * start, int64_t unit_first, Range * rows) {
    for (int64_t t = block.first; t < block.last; t++) {
        for (int g = 0; g < block.heads; g++) {
            *rows++ = {start[t] - unit_first, t + 1 - unit_first};
        }
    }
}

namespace {

/// n floats as words: themselves, BF16 pairs (the last one padded with 0), or blocks of 16-bit
/// integers, their scales to `scales`.
GGFT_INLINE void to_words(Format format, const float * from, int64_t n, uint32_t * words,
                          [[maybe_unused]] float * scales) {
#if defined(GGFT_I16)
    if (format == Format::i16_even) {
        quantize_row_i16<Format::i16_even>(from, n, I16_LIMIT, (int16_t *)words, scales);
        return;
    }
#endif
    if (format == Format::f32) {
        std::memcpy(words, from, (size_t)n * 4);
    } else {
        store_bf16_pairs((uint16_t *)words, from, n);
    }
}

/// Rows of one head lie a token apart, which hardware prefetchers follow badly.
GGFT_INLINE void prefetch_row(const HeadRows & x, int64_t row, int64_t n_rows) {
    if (row >= n_rows)
        return;
    const float * p = x.row(row);
    for (int d = 0; d < x.head_size; d += 16)
        __builtin_prefetch(p + d);
}

} // namespace

void pack_tile_rows(Format format, const HeadRows & x, int64_t n_rows, uint32_t * out,
                    float * scales) {
    for (int64_t i = 0; i < n_rows; i++) {
        prefetch_row(x, i + 8, n_rows);
        to_words(format, x.row(i), x.head_size, out + i * STRIDE, scales + i * I16_BLOCKS);
    }
}

void pack_columns(Format format, const HeadRows & x, int64_t n_rows, uint32_t * out) {
    alignas(64) uint32_t rows[LANES * STRIDE];
    float scales[LANES][I16_BLOCKS];
    const int64_t words = tile_steps(format, x.head_size), steps = panel_steps(format, x.head_size);
    for (int64_t r = 0; r < round_up(n_rows, NR); r += LANES) {
        for (int64_t i = 0; i < LANES; i++) {
            uint32_t * row = rows + i * STRIDE;
            prefetch_row(x, r + i + LANES, n_rows);
            if (r + i < n_rows) {
                to_words(format, x.row(r + i), x.head_size, row, scales[i]);
            } else {
                std::memset(row, 0, (size_t)words * 4);
                std::memset(scales[i], 0, sizeof scales[i]);
            }
        }
        transpose_rows(format, rows, STRIDE, x.head_size, scales[0], nullptr, I16_BLOCKS,
                       out + r / NR * steps * NR + r % NR);
    }
}

namespace {

#if defined(GGFT_I16)
void pack_depth_i16(const HeadRows & x, int64_t n_rows, uint32_t * out) {
    constexpr int64_t WIDTH = MAX_HEAD_SIZE + NR;
    alignas(64) float rows[I16_DEPTH * WIDTH];
    const int64_t width = head_columns(x.head_size),
                  panel_words = panel_steps(Format::i16_even, n_rows) * NR;
    for (int64_t first = 0; first < n_rows;
         first += I16_DEPTH, out += panel_steps(Format::i16_even, I16_DEPTH) * NR) {
        VI most[WIDTH / LANES] = {};
        for (int64_t i = 0; i < I16_DEPTH; i++) {
            float * row = rows + i * width;
            const int64_t n = first + i < n_rows ? x.head_size : 0;
            prefetch_row(x, first + i + 8, n_rows);
            if (n)
                std::memcpy(row, x.row(first + i), (size_t)n * 4);
            std::fill(row + n, row + width, 0.0f);
            for (int64_t c = 0; c < width; c += LANES)
                most[c / LANES] = larger(most[c / LANES], magnitude(load(row + c)));
        }
        quantize_panels_i16<Format::i16_even>(rows, width, I16_DEPTH, most, width, panel_words,
                                              out);
    }
}
#endif

} // namespace

void pack_depth(Format format, const HeadRows & x, int64_t n_rows, uint32_t * out) {
#if defined(GGFT_I16)
    if (format == Format::i16_even) {
        pack_depth_i16(x, n_rows, out);
        return;
    }
#endif
    const bool bf16 = format == Format::bf16;
    const int64_t per = per_word(format), steps = (n_rows + per - 1) / per;
    alignas(64) float first[MAX_HEAD_SIZE + NR] = {}, second[MAX_HEAD_SIZE + NR] = {};
    for (int64_t s = 0; s < steps; s++) {
        std::memcpy(first, x.row(per * s), (size_t)x.head_size * 4);
        if (bf16 && per * s + 1 < n_rows) {
            std::memcpy(second, x.row(per * s + 1), (size_t)x.head_size * 4);
        } else {
            std::fill(second, second + x.head_size, 0.0f);
        }
        for (int64_t c = 0; c < head_columns(x.head_size); c += LANES) {
            uint32_t * to = out + (c / NR * steps + s) * NR + c % NR;
            V words = load(first + c);
            if (bf16) {
                words = (V)pair_bf16(words, load(second + c));
            }
            std::memcpy(to, &words, sizeof words);
        }
    }
}

} // namespace ggft::attention_detail
