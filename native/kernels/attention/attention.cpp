#include "kernels/attention/attention.h"

#include <algorithm>
#include <cmath>

#include "kernels/attention/tiles.h"
#include "kernels/isa/memory.h"

namespace ggft {

using namespace attention_detail;

namespace {

constexpr float NO_SCORE = -1e30f; // finite, so that differences of two of them are 0

/// Where a thread's working memory holds what, in words.
struct Layout {
    int64_t keys, values, queries, query_scales, scores, probabilities, probability_scales, result,
        end;
    Layout(Format format, const AttentionShape & s) {
        keys = 0;
        values = keys + round_up(s.n_tokens, NR) * panel_steps(format, s.head_size);
        queries = round_up(
            values + head_columns(s.head_size) * panel_steps(format, round_up(s.n_tokens, 2)), 16);
        query_scales = queries + ROWS * STRIDE;
        scores = query_scales + ROWS * I16_BLOCKS;
        probabilities = scores + MR * KEYS;
        probability_scales = probabilities + round_up(MR * STRIDE, 16);
        result = probability_scales + round_up(MR * I16_BLOCKS, 16);
        end = result + ROWS * head_columns(s.head_size);
    }
};

struct Forward {
    Format format;
    const AttentionShape & s;
    const float *q, *k, *v;
    const int32_t * start;
    float *o, *lse;
};

/// Scores of keys [k0, k0+n), a whole number of panels, for one row tile: [rows][KEYS].
void score_tile(const Forward & f, const uint32_t * rows, const float * row_scales, int n_rows,
                const uint32_t * panels, int64_t k0, int64_t n, float * scores) {
    const int64_t steps = panel_steps(f.format, f.s.head_size);
    TileArgs g = {};
    g.ldy = KEYS;
    const TileFunction tile = tile_of_format<Format::i16_even, STRIDE>(f.format, n_rows);
    for (int64_t c = 0; c < n; c += NR) {
        reduce_over(f.format, g, rows, row_scales, panels + (k0 + c) * steps, 0, f.s.head_size);
        g.y = scores + c;
        tile(g);
    }
}

struct Running {
    float max = NO_SCORE, sum = 0;
};

/// One row's softmax over scores [from, n) (multiples of LANES), of which [first, last) are seen:
/// p = e^(scale*z - max), 0 where unseen, as tile row. 16-bit integers take whole blocks from z,
/// which is overwritten. Returns the factor by which what was summed before must shrink.
template <Format FORMAT>
float softmax_row(float * z, int64_t from, int64_t n, int64_t first, int64_t last, float scale,
                  Running & run, uint32_t * p, [[maybe_unused]] float * p_scales) {
    VI lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    first = std::max(first, from);
    last = std::min(last, n);
    const auto at_edge = [&](int64_t c) { return c < first || c + LANES > last; };
    const auto seen = [&](int64_t c) {
        const VI index = lane + (int32_t)c;
        return (index >= (int32_t)first) & (index < (int32_t)last);
    };
    const auto put = [&](int64_t c, V e) {
        if (FORMAT == Format::bf16) {
            store_bf16((uint16_t *)p + c, e);
        } else {
            store(FORMAT == Format::i16_even ? z + c : (float *)p + c, e);
        }
    };
    V best = splat(NO_SCORE);
    const int64_t begin = first / LANES * LANES;
    for (int64_t c = begin; c < last; c += LANES) {
        const V s = load(z + c);
        best = vmax(at_edge(c) ? select(seen(c), s, splat(NO_SCORE)) : s, best);
    }
    const float new_max = std::max(run.max, max_lanes(best) * scale);
    V total = {};
    int64_t c = from;
    for (; c < begin; c += LANES)
        put(c, V{});
    for (; c < last; c += LANES) {
        V e = vexp(fma(load(z + c), splat(scale), splat(-new_max)));
        if (at_edge(c))
            e = select(seen(c), e, V{});
        put(c, e);
        total += e;
    }
    for (; c < n; c += LANES)
        put(c, V{});
#if defined(GGFT_I16)
    if (FORMAT == Format::i16_even) {
        quantize_row_i16<Format::i16_even>(z + from, n - from, I16_LIMIT, (int16_t *)p + from,
                                           p_scales + from / I16_DEPTH);
    }
#endif
    const float shrink = run.max == new_max ? 1.0f : vexp(splat(run.max - new_max))[0];
    run.sum = run.sum * shrink + sum_lanes(total);
    run.max = new_max;
    return shrink;
}

using SoftmaxRow = float (*)(float *, int64_t, int64_t, int64_t, int64_t, float, Running &,
                             uint32_t *, float *);
SoftmaxRow softmax_of(Format format) {
    switch (format) {
    case Format::bf16:
        return softmax_row<Format::bf16>;
    case Format::i16_even:
        return softmax_row<Format::i16_even>;
    default:
        return softmax_row<Format::f32>;
    }
}

/// Add one key block to the result of one row tile: rows [r0, r0+n_rows) of the query block. Scores
/// and probabilities are indexed from the first key of the block on.
void forward_tile(const Forward & f, uint32_t * memory, const Layout & at, int64_t depth,
                  const Range * seen, int64_t r0, int n_rows, int64_t block_k0, Running * running) {
    const int64_t first = std::max<int64_t>(0, seen[r0].first / NR * NR - block_k0);
    const int64_t last = std::min(KEYS, seen[r0 + n_rows - 1].last - block_k0);
    if (first >= last)
        return;
    const int64_t unit = f.format == Format::i16_even ? I16_DEPTH : NR;
    const int64_t width = head_columns(f.s.head_size);
    float * scores = (float *)(memory + at.scores);
    uint32_t * p = memory + at.probabilities;
    float * p_scales = (float *)(memory + at.probability_scales);
    float * result = (float *)(memory + at.result) + r0 * width;
    score_tile(f, memory + at.queries + r0 * STRIDE,
               (float *)(memory + at.query_scales) + r0 * I16_BLOCKS, n_rows, memory + at.keys,
               block_k0 + first, round_up(last - first, NR), scores + first);
    const SoftmaxRow softmax = softmax_of(f.format);
    for (int i = 0; i < n_rows; i++) {
        const Range row = seen[r0 + i];
        const float shrink = softmax(scores + i * KEYS, first / unit * unit, round_up(last, unit),
                                     row.first - block_k0, row.last - block_k0, f.s.scale,
                                     running[r0 + i], p + i * STRIDE, p_scales + i * I16_BLOCKS);
        if (shrink == 1.0f)
            continue;
        for (int64_t c = 0; c < width; c += LANES) {
            store(result + i * width + c, load(result + i * width + c) * shrink);
        }
    }
    TileArgs g = {};
    g.ldy = width;
    g.add = true;
    const uint32_t * values = memory + at.values + panel_steps(f.format, block_k0) * NR;
    for (int64_t c = 0; c < width; c += NR) {
        reduce_over(f.format, g, p, p_scales, values + c * depth, first, last);
        g.y = result + c;
        tile_of_format<Format::i16_even, STRIDE>(f.format, n_rows)(g);
    }
}

void forward_block(const Forward & f, const Unit & unit, const QueryBlock & block,
                   uint32_t * memory, const Layout & at) {
    const AttentionShape & s = f.s;
    const int64_t rows = block.rows(), width = head_columns(s.head_size);
    const int64_t row = (block.first * s.n_head + block.head) * s.head_size;
    const int64_t depth = panel_steps(f.format, unit.last - unit.first);
    Running running[ROWS];
    Range seen[ROWS];
    seen_keys(block, f.start, unit.first, seen);
    pack_tile_rows(f.format, {f.q + row, s.n_head * s.head_size, block.heads, s.head_size}, rows,
                   memory + at.queries, (float *)(memory + at.query_scales));
    float * result = (float *)(memory + at.result);
    std::fill(result, result + rows * width, 0.0f);
    for (int64_t k0 = seen[0].first / I16_DEPTH * I16_DEPTH; k0 < seen[rows - 1].last; k0 += KEYS) {
        for (int64_t r = 0; r < rows; r += MR) {
            forward_tile(f, memory, at, depth, seen, r, (int)std::min<int64_t>(MR, rows - r), k0,
                         running);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = block.first + r / block.heads, head = block.head + r % block.heads;
        float * to = f.o + (token * s.n_head + head) * s.head_size;
        const float * from = result + r * width;
        const float inv = 1.0f / running[r].sum;
        for (int d = 0; d < s.head_size; d++)
            to[d] = from[d] * inv;
        f.lse[token * s.n_head + head] = running[r].max + std::log(running[r].sum);
    }
}

} // namespace

void attention(Precision precision, const AttentionShape & s, const float * q, const float * k,
               const float * v, const int32_t * start, float * o, float * lse, int ith, int nth) {
    const Format format = attention_format(precision);
    const Forward f = {format, s, q, k, v, start, o, lse};
    const Layout at(format, s);
    uint32_t * memory = thread_words((size_t)at.end);
    const int64_t token = s.n_head_kv * s.head_size;
    for (const Unit & unit : plan_units(s, start, ith, nth)) {
        const int64_t n = unit.last - unit.first;
        const int64_t row = unit.first * token + unit.head_kv * s.head_size;
        pack_columns(format, {k + row, token, 1, s.head_size}, n, memory + at.keys);
        pack_depth(format, {v + row, token, 1, s.head_size}, n, memory + at.values);
        const std::vector<QueryBlock> blocks = query_blocks(s, unit);
        for (size_t b = 0; b < blocks.size(); b++) {
            if (unit.shared && (int)(b % (size_t)nth) != ith)
                continue;
            forward_block(f, unit, blocks[b], memory, at);
        }
    }
}

size_t attention_scratch_bytes(Precision precision, const AttentionShape & shape) {
    return (size_t)Layout(attention_format(precision), shape).end * 4;
}

} // namespace ggft
