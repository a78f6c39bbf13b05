#include "kernels/attention/attention.h"

#include "kernels/attention/tiles.h"
#include "kernels/isa/memory.h"

namespace ggft::GGFT_ISA_NAMESPACE {
namespace {

constexpr float NO_SCORE = -1e30f; // finite, so that differences of two of them are 0

/// Where a thread's working memory holds what, in words.
template <class F> struct Layout {
    int64_t keys, values, queries, query_scales, scores, probabilities, probability_scales, result,
        end;
    explicit Layout(const AttentionShape & s) {
        keys = 0;
        values = keys + round_up(s.n_tokens, NR) * panel_steps<F>(s.head_size);
        queries = round_up(
            values + head_columns(s.head_size) * panel_steps<F>(round_up(s.n_tokens, 2)), 16);
        query_scales = queries + QUERY_ROWS * ROW_WORDS;
        scores = query_scales + QUERY_ROWS * I16_BLOCKS;
        probabilities = scores + MR * KEY_BLOCK;
        probability_scales = probabilities + round_up(MR * ROW_WORDS, 16);
        result = probability_scales + round_up(MR * I16_BLOCKS, 16);
        end = result + QUERY_ROWS * head_columns(s.head_size);
    }
};

template <class F> struct Forward {
    const AttentionShape & s;
    const float *q, *k, *v;
    const int32_t * start;
    float *o, *lse;
    Layout<F> at;
    uint32_t * memory;

    uint32_t * words(int64_t offset) const { return memory + offset; }
    float * floats(int64_t offset) const { return (float *)(memory + offset); }
};

/// Scores of keys [k0, k0+n), a whole number of panels, for the row tile at row r of the query
/// block: [rows][KEY_BLOCK].
template <class F>
void score_tile(const Forward<F> & f, int64_t r, int n_rows, int64_t k0, int64_t n,
                float * scores) {
    const int64_t steps = panel_steps<F>(f.s.head_size);
    TileArgs g = {};
    g.ldy = KEY_BLOCK;
    const TileFunction tile = attention_tile<F>(n_rows);
    for (int64_t c = 0; c < n; c += NR) {
        reduce_over<F>(g, f.words(f.at.queries) + r * ROW_WORDS,
                       f.floats(f.at.query_scales) + r * I16_BLOCKS,
                       f.words(f.at.keys) + (k0 + c) * steps, 0, f.s.head_size);
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
template <class F>
float softmax_row(float * z, int64_t from, int64_t n, int64_t first, int64_t last, float scale,
                  Running & run, uint32_t * p, [[maybe_unused]] float * p_scales) {
    first = max(first, from);
    last = min(last, n);
    const auto at_edge = [&](int64_t c) { return c < first || c + LANES > last; };
    const auto seen = [&](int64_t c) {
        const VI index = lane_numbers((int32_t)c);
        return (index >= (int32_t)first) & (index < (int32_t)last);
    };
    const auto put = [&](int64_t c, V e) {
        if constexpr (F::IS_BF16)
            store_bf16((uint16_t *)p + c, e);
        else
            store(F::BLOCKED ? z + c : (float *)p + c, e);
    };
    V best = splat(NO_SCORE);
    const int64_t begin = first / LANES * LANES;
    for (int64_t c = begin; c < last; c += LANES) {
        const V s = load(z + c);
        best = vmax(at_edge(c) ? select(seen(c), s, splat(NO_SCORE)) : s, best);
    }
    const float new_max = max(run.max, max_lanes(best) * scale);
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
    if constexpr (F::BLOCKED) {
        quantize_row_i16<F>(z + from, n - from, F::ROW_LIMIT, (int16_t *)p + from,
                            p_scales + from / F::DEPTH);
    }
    const float shrink = run.max == new_max ? 1.0f : vexp(splat(run.max - new_max))[0];
    run.sum = run.sum * shrink + sum_lanes(total);
    run.max = new_max;
    return shrink;
}

/// Add one key block to the result of one row tile: rows [r0, r0+n_rows) of the query block. Scores
/// and probabilities are indexed from the first key of the block on.
template <class F>
void forward_tile(const Forward<F> & f, int64_t depth, const Range * seen, int64_t r0, int n_rows,
                  int64_t block_k0, Running * running) {
    const int64_t first = max<int64_t>(0, seen[r0].first / NR * NR - block_k0);
    const int64_t last = min(KEY_BLOCK, seen[r0 + n_rows - 1].last - block_k0);
    if (first >= last)
        return;
    constexpr int64_t unit = F::BLOCKED ? I16_DEPTH : NR;
    const int64_t width = head_columns(f.s.head_size);
    float * scores = f.floats(f.at.scores);
    uint32_t * p = f.words(f.at.probabilities);
    float * p_scales = f.floats(f.at.probability_scales);
    float * result = f.floats(f.at.result) + r0 * width;
    score_tile(f, r0, n_rows, block_k0 + first, round_up(last - first, NR), scores + first);
    for (int i = 0; i < n_rows; i++) {
        const Range row = seen[r0 + i];
        const float shrink =
            softmax_row<F>(scores + i * KEY_BLOCK, first / unit * unit, round_up(last, unit),
                           row.first - block_k0, row.last - block_k0, f.s.scale, running[r0 + i],
                           p + i * ROW_WORDS, p_scales + i * I16_BLOCKS);
        if (shrink == 1.0f)
            continue;
        for (int64_t c = 0; c < width; c += LANES) {
            store(result + i * width + c, load(result + i * width + c) * shrink);
        }
    }
    TileArgs g = {};
    g.ldy = width;
    g.add = true;
    const uint32_t * values = f.words(f.at.values) + panel_steps<F>(block_k0) * NR;
    for (int64_t c = 0; c < width; c += NR) {
        reduce_over<F>(g, p, p_scales, values + c * depth, first, last);
        g.y = result + c;
        attention_tile<F>(n_rows)(g);
    }
}

template <class F>
void forward_block(const Forward<F> & f, const ExampleSpan & span, const QueryBlock & block) {
    const AttentionShape & s = f.s;
    const int64_t rows = block.rows(), width = head_columns(s.head_size);
    const int64_t row = (block.first * s.n_head + block.head) * s.head_size;
    const int64_t depth = panel_steps<F>(span.last - span.first);
    Running running[QUERY_ROWS];
    Range seen[QUERY_ROWS];
    seen_keys(block, f.start, span.first, seen);
    pack_tile_rows<F>({f.q + row, s.n_head * s.head_size, block.heads, s.head_size}, rows,
                      f.words(f.at.queries), f.floats(f.at.query_scales));
    float * result = f.floats(f.at.result);
    fill(result, result + rows * width, 0.0f);
    for (int64_t k0 = seen[0].first / I16_DEPTH * I16_DEPTH; k0 < seen[rows - 1].last;
         k0 += KEY_BLOCK) {
        for (int64_t r = 0; r < rows; r += MR)
            forward_tile(f, depth, seen, r, (int)min<int64_t>(MR, rows - r), k0, running);
    }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = block.first + r / block.heads, head = block.head + r % block.heads;
        float * to = f.o + (token * s.n_head + head) * s.head_size;
        const float * from = result + r * width;
        const float inv = 1.0f / running[r].sum;
        for (int d = 0; d < s.head_size; d++)
            to[d] = from[d] * inv;
        f.lse[token * s.n_head + head] = running[r].max + __builtin_logf(running[r].sum);
    }
}

template <class F> void forward_spans(const Forward<F> & f, int ith, int nth) {
    const AttentionShape & s = f.s;
    const int64_t token = s.n_head_kv * s.head_size;
    for (const ExampleSpan & span : Spans(s, f.start, ith, nth)) {
        const int64_t n = span.last - span.first;
        const int64_t row = span.first * token + span.head_kv * s.head_size;
        pack_columns<F>({f.k + row, token, 1, s.head_size}, n, f.words(f.at.keys));
        pack_depth<F>({f.v + row, token, 1, s.head_size}, n, f.words(f.at.values));
        const QueryBlocks blocks(s, span);
        for (int64_t b = 0; b < blocks.size(); b++) {
            if (!span.shared || b % nth == ith)
                forward_block(f, span, blocks[b]);
        }
    }
}

void attention_forward(Format format, const AttentionShape & s, const float * q, const float * k,
                       const float * v, const int32_t * start, float * o, float * lse, int ith,
                       int nth) {
    with_attention_format(format, [&](auto f) {
        using F = decltype(f);
        const Layout<F> at(s);
        uint32_t * memory = thread_words((size_t)at.end);
        forward_spans(Forward<F>{s, q, k, v, start, o, lse, at, memory}, ith, nth);
    });
}

size_t attention_scratch_bytes(Format format, const AttentionShape & s) {
    return with_attention_format(format,
                                 [&](auto f) { return (size_t)Layout<decltype(f)>(s).end * 4; });
}

} // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {attention_forward, attention_backward,
                                            attention_scratch_bytes,
                                            attention_backward_scratch_bytes};

} // namespace ggft::GGFT_ISA_NAMESPACE
