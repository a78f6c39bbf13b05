#include "kernels_attention.h"

#include <algorithm>
#include <cmath>

#include "kernels_attention_plan.h"
#include "kernels_pack.h"

namespace ggft {

using namespace attention_detail;

namespace {

constexpr float NO_SCORE = -1e30f; // finite, so that differences of two of them are 0

/// Where a thread's working memory holds what, in words.
struct Layout {
    int64_t keys, values, queries, scores, probabilities, result, end;
    Layout(bool bf16, const AttentionShape & s) {
        keys = 0;
        values = keys + round_up(s.n_tokens, NR) * head_steps(bf16, s.head_size);
        queries = values + head_columns(s.head_size) * round_up(s.n_tokens, 2) / per_word(bf16);
        scores = round_up(queries, 16) + ROWS * STRIDE;
        queries = round_up(queries, 16);
        probabilities = scores + MR * KEYS;
        result = probabilities + round_up(MR * STRIDE, 16);
        end = result + ROWS * head_columns(s.head_size);
    }
};

struct Forward {
    bool bf16;
    const AttentionShape & s;
    const float *q, *k, *v;
    const int32_t * start;
    float *o, *lse;
};

/// Scores of keys [k0, k0+n) for one row tile, [rows][KEYS]; panels that no row sees are skipped.
void score_tile(bool bf16, const uint32_t * rows, int n_rows, const uint32_t * panels,
                int64_t steps, int64_t k0, int64_t n, float * scores) {
    TileArgs g = {};
    g.rows = rows;
    g.steps = (int)steps;
    g.ldy = KEYS;
    const TileFunction tile = tile_function<STRIDE>(bf16, n_rows);
    for (int64_t c = 0; c < n; c += NR) {
        g.panel = panels + (k0 + c) * steps;
        g.y = scores + c;
        tile(g);
    }
}

struct Running {
    float max = NO_SCORE, sum = 0;
};

/// One row's softmax over n scores (n a multiple of LANES), of which [first, last) are seen:
/// p = e^(scale*z - max), 0 where unseen, as tile row of BF16 or F32. Returns the factor by which
/// what was summed before must shrink.
template <bool BF16>
float softmax_row(const float * z, int64_t n, int64_t first, int64_t last, float scale,
                  Running & run, uint32_t * p) {
    VI lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    first = std::max<int64_t>(first, 0);
    last = std::min(last, n);
    const auto at_edge = [&](int64_t c) { return c < first || c + LANES > last; };
    const auto seen = [&](int64_t c) {
        const VI index = lane + (int32_t)c;
        return (index >= (int32_t)first) & (index < (int32_t)last);
    };
    const auto put = [&](int64_t c, V e) {
        if (BF16) {
            store_bf16((uint16_t *)p + c, e);
        } else {
            store((float *)p + c, e);
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
    int64_t c = 0;
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
    const float shrink = run.max == new_max ? 1.0f : vexp(splat(run.max - new_max))[0];
    run.sum = run.sum * shrink + sum_lanes(total);
    run.max = new_max;
    return shrink;
}

/// Add one key block to the result of one row tile: rows [r0, r0+n_rows) of the query block.
void forward_tile(const Forward & f, uint32_t * memory, const Layout & at, int64_t depth,
                  const Range * seen, int64_t r0, int n_rows, int64_t block_k0, Running * running) {
    const int64_t k0 = std::max(block_k0, seen[r0].first / NR * NR);
    const int64_t k1 = std::min(block_k0 + KEYS, seen[r0 + n_rows - 1].last);
    if (k0 >= k1)
        return;
    const int64_t n = round_up(k1 - k0, NR), per = per_word(f.bf16);
    const int64_t width = head_columns(f.s.head_size), steps = head_steps(f.bf16, f.s.head_size);
    float * scores = (float *)(memory + at.scores);
    uint32_t * p = memory + at.probabilities;
    float * result = (float *)(memory + at.result) + r0 * width;
    score_tile(f.bf16, memory + at.queries + r0 * STRIDE, n_rows, memory + at.keys, steps, k0, n,
               scores);
    const auto softmax = f.bf16 ? softmax_row<true> : softmax_row<false>;
    for (int i = 0; i < n_rows; i++) {
        const float shrink =
            softmax(scores + i * KEYS, n, seen[r0 + i].first - k0, seen[r0 + i].last - k0,
                    f.s.scale, running[r0 + i], p + i * STRIDE);
        if (shrink == 1.0f)
            continue;
        for (int64_t c = 0; c < width; c += LANES) {
            store(result + i * width + c, load(result + i * width + c) * shrink);
        }
    }
    TileArgs g = {};
    g.rows = p;
    g.steps = (int)((k1 - k0 + per - 1) / per);
    g.ldy = width;
    g.add = true;
    for (int64_t c = 0; c < width; c += NR) {
        g.panel = memory + at.values + c * depth + k0 / per * NR;
        g.y = result + c;
        tile_function<STRIDE>(f.bf16, n_rows)(g);
    }
}

void forward_block(const Forward & f, const Unit & unit, const QueryBlock & block,
                   uint32_t * memory, const Layout & at) {
    const AttentionShape & s = f.s;
    const int64_t rows = block.rows(), width = head_columns(s.head_size);
    const int64_t row = (block.first * s.n_head + block.head) * s.head_size;
    const int64_t per = per_word(f.bf16), depth = (unit.last - unit.first + per - 1) / per;
    Running running[ROWS];
    Range seen[ROWS];
    seen_keys(block, f.start, unit.first, seen);
    pack_tile_rows(f.bf16, {f.q + row, s.n_head * s.head_size, block.heads, s.head_size}, rows,
                   memory + at.queries);
    float * result = (float *)(memory + at.result);
    std::fill(result, result + rows * width, 0.0f);
    for (int64_t k0 = seen[0].first / NR * NR; k0 < seen[rows - 1].last; k0 += KEYS) {
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
    const bool bf16 = HAS_BF16 && precision == Precision::fast;
    const Forward f = {bf16, s, q, k, v, start, o, lse};
    const Layout at(bf16, s);
    uint32_t * memory = scratch((size_t)at.end);
    const int64_t token = s.n_head_kv * s.head_size;
    for (const Unit & unit : plan_units(s, start, ith, nth)) {
        const int64_t n = unit.last - unit.first;
        const int64_t row = unit.first * token + unit.head_kv * s.head_size;
        pack_columns(bf16, {k + row, token, 1, s.head_size}, n, memory + at.keys);
        pack_depth(bf16, {v + row, token, 1, s.head_size}, n, memory + at.values);
        const std::vector<QueryBlock> blocks = query_blocks(s, unit);
        for (size_t b = 0; b < blocks.size(); b++) {
            if (unit.shared && (int)(b % (size_t)nth) != ith)
                continue;
            forward_block(f, unit, blocks[b], memory, at);
        }
    }
}

size_t attention_scratch_bytes(Precision precision, const AttentionShape & shape) {
    return (size_t)Layout(HAS_BF16 && precision == Precision::fast, shape).end * 4;
}

} // namespace ggft
