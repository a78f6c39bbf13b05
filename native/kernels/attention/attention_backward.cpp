#include "kernels/attention/tiles.h"
#include "kernels/isa/memory.h"

// For every block of query rows and every block of keys it sees, with everything in L2:
//
//   S = q k', dP = d_o v'         one register tile each
//   p = e^(scale*S - lse), dS = p * (dP - delta) * scale
//   dq += dS k                    rows of dS against k
//   dv += p' d_o, dk += dS' q     p and dS transposed, then rows of them against d_o and q
//
// dk and dv gather in buffers of the thread. On a span that all threads share, each owns some query
// blocks (for dq) and some key blocks (for dk and dv), and computes the tiles that either needs.

namespace ggft::GGFT_ISA_NAMESPACE {
namespace {

constexpr int64_t BACKWARD_KEYS = 64; // scores of a block, and their gradients: 24 KB each

/// Where a thread's working memory holds what, in words.
template <class F> struct Layout {
    int64_t k_columns, v_columns, k_depth, q_rows, q_scales, o_rows, o_scales, q_depth, o_depth, p,
        ds, ds_rows, ds_scales, transposed, transposed_scales, dq, dk, dv, end = 0;
    int64_t take(int64_t words) {
        const int64_t at = end;
        end += round_up(words, 16);
        return at;
    }
    explicit Layout(const AttentionShape & s) {
        const int64_t steps = panel_steps<F>(s.head_size), width = head_columns(s.head_size);
        const int64_t n = round_up(s.n_tokens, NR);
        k_columns = take(n * steps);
        v_columns = take(n * steps);
        k_depth = take(width * panel_steps<F>(n));
        q_rows = take(QUERY_ROWS * ROW_WORDS);
        q_scales = take(QUERY_ROWS * I16_BLOCKS);
        o_rows = take(QUERY_ROWS * ROW_WORDS);
        o_scales = take(QUERY_ROWS * I16_BLOCKS);
        q_depth = take(width * panel_steps<F>(QUERY_ROWS));
        o_depth = take(width * panel_steps<F>(QUERY_ROWS));
        p = take(QUERY_ROWS * BACKWARD_KEYS);
        ds = take(QUERY_ROWS * BACKWARD_KEYS);
        ds_rows = take(QUERY_ROWS * ROW_WORDS);
        ds_scales = take(QUERY_ROWS * I16_BLOCKS);
        transposed = take(BACKWARD_KEYS * ROW_WORDS);
        transposed_scales = take(BACKWARD_KEYS * I16_BLOCKS);
        dq = take(QUERY_ROWS * width);
        dk = take(n * width);
        dv = take(n * width);
    }
};

template <class F> struct Backward {
    const AttentionShape & s;
    const float *q, *k, *v;
    const int32_t * start;
    const float *o, *lse, *d_o;
    float *dq, *dk, *dv;
    Layout<F> at;
    uint32_t * memory;

    uint32_t * words(int64_t offset) const { return memory + offset; }
    float * floats(int64_t offset) const { return (float *)(memory + offset); }
};

/// One query block at work.
struct BlockState {
    int64_t rows;
    Range seen[QUERY_ROWS]; // keys that each row sees
    float lse[QUERY_ROWS], delta[QUERY_ROWS];
};

/// S and dP of all rows for keys [k0, k0+n); undefined where a row tile sees nothing of a panel.
template <class F>
void score_tiles(const Backward<F> & b, const BlockState & block, int64_t k0, int64_t n) {
    TileArgs g = {};
    const int64_t steps = panel_steps<F>(b.s.head_size);
    g.ldy = BACKWARD_KEYS;
    const auto run = [&](TileFunction tile, int64_t rows, int64_t scales, int64_t columns,
                         int64_t y, int64_t r, int64_t c) {
        reduce_over<F>(g, b.words(rows) + r * ROW_WORDS, b.floats(scales) + r * I16_BLOCKS,
                       b.words(columns) + (k0 + c) * steps, 0, b.s.head_size);
        g.y = b.floats(y) + r * BACKWARD_KEYS + c;
        tile(g);
    };
    for (int64_t r = 0; r < block.rows; r += MR) {
        const int n_rows = (int)min<int64_t>(MR, block.rows - r);
        const TileFunction tile = attention_tile<F>(n_rows);
        const int64_t first = block.seen[r].first, last = block.seen[r + n_rows - 1].last;
        for (int64_t c = 0; c < n && k0 + c < last; c += NR) {
            if (k0 + c + NR <= first)
                continue;
            run(tile, b.at.q_rows, b.at.q_scales, b.at.k_columns, b.at.p, r, c);
            run(tile, b.at.o_rows, b.at.o_scales, b.at.v_columns, b.at.ds, r, c);
        }
    }
}

/// Row r, keys from c on: scores and dP to p and dS; zero where unseen.
template <class F>
GGFT_INLINE void gradient_lanes(const Backward<F> & b, const BlockState & block, int64_t r,
                                int64_t k0, int64_t c, V & p, V & ds) {
    const int64_t at = r * BACKWARD_KEYS + c;
    const Range seen = block.seen[r];
    p = ds = V{};
    if (k0 + c >= seen.last || k0 + c + LANES <= seen.first)
        return;
    p = vexp(fma(load(b.floats(b.at.p) + at), splat(b.s.scale), splat(-block.lse[r])));
    ds = p * (load(b.floats(b.at.ds) + at) - splat(block.delta[r])) * b.s.scale;
    if (k0 + c >= seen.first && k0 + c + LANES <= seen.last)
        return;
    const VI index = lane_numbers((int32_t)(k0 + c));
    const VI mask = (index >= (int32_t)seen.first) & (index < (int32_t)seen.last);
    p = select(mask, p, V{});
    ds = select(mask, ds, V{});
}

/// All rows for n keys. F32 and 16-bit integers: p and dS replace scores and dP. BF16: rows 2i and
/// 2i+1 become words of row i. dS is also written as tile rows.
template <class F>
void gradient_rows(const Backward<F> & b, const BlockState & block, int64_t k0, int64_t n) {
    constexpr bool BF16 = F::IS_BF16;
    constexpr int64_t PER = BF16 ? 2 : 1;
    for (int64_t i = 0; i < round_up(block.rows, PER * LANES) / PER; i++) {
        float * p_out = b.floats(b.at.p) + i * BACKWARD_KEYS;
        float * ds_out = b.floats(b.at.ds) + i * BACKWARD_KEYS;
        for (int64_t c = 0; c < n; c += LANES) {
            V p[PER] = {}, ds[PER] = {};
            for (int64_t j = 0; j < PER && i * PER + j < block.rows; j++) {
                const int64_t r = i * PER + j;
                gradient_lanes(b, block, r, k0, c, p[j], ds[j]);
                uint32_t * row = b.words(b.at.ds_rows) + r * ROW_WORDS;
                if constexpr (BF16)
                    store_bf16((uint16_t *)row + c, ds[j]);
                else if constexpr (!F::BLOCKED)
                    store((float *)row + c, ds[j]);
            }
            store(p_out + c, BF16 ? (V)pair_bf16(p[0], p[PER - 1]) : p[0]);
            store(ds_out + c, BF16 ? (V)pair_bf16(ds[0], ds[PER - 1]) : ds[0]);
        }
        if constexpr (F::BLOCKED) {
            if (i < block.rows) {
                quantize_row_i16<F>(ds_out, n, F::ROW_LIMIT,
                                    (int16_t *)(b.words(b.at.ds_rows) + i * ROW_WORDS),
                                    b.floats(b.at.ds_scales) + i * I16_BLOCKS);
            }
        }
    }
}

/// dq += dS k for the block's rows and keys [k0, k0+n).
template <class F>
void add_dq(const Backward<F> & b, const BlockState & block, int64_t depth, int64_t k0, int64_t n) {
    const int64_t width = head_columns(b.s.head_size);
    const uint32_t * panels = b.words(b.at.k_depth) + panel_steps<F>(k0) * NR;
    TileArgs g = {};
    g.ldy = width;
    g.add = true;
    for (int64_t r = 0; r < block.rows; r += MR) {
        const int n_rows = (int)min<int64_t>(MR, block.rows - r);
        const int64_t keys = min(n, block.seen[r + n_rows - 1].last - k0);
        if (keys <= 0)
            continue;
        const TileFunction tile = attention_tile<F>(n_rows);
        for (int64_t c = 0; c < width; c += NR) {
            reduce_over<F>(g, b.words(b.at.ds_rows) + r * ROW_WORDS,
                           b.floats(b.at.ds_scales) + r * I16_BLOCKS, panels + c * depth, 0, keys);
            g.y = b.floats(b.at.dq) + r * width + c;
            tile(g);
        }
    }
}

/// sums += x' panels for keys [k0, k0+n): x is p or dS, panels are d_o or q by depth.
template <class F>
void add_transposed(const Backward<F> & b, const BlockState & block, const float * x,
                    const uint32_t * panels, int64_t k0, int64_t n, float * sums) {
    const int64_t per = F::PER_WORD, width = head_columns(b.s.head_size);
    const int64_t steps = panel_steps<F>(block.rows);
    // Rows of x that are transposed as they are: floats, or words of two.
    const int64_t x_rows = F::IS_BF16 ? (block.rows + 1) / 2 : block.rows;
    uint32_t * transposed = b.words(b.at.transposed);
    float * scales = b.floats(b.at.transposed_scales);
    for (int64_t r = 0; r < x_rows; r += LANES) {
        transpose_words((const uint32_t *)x + r * BACKWARD_KEYS, BACKWARD_KEYS, n, transposed + r,
                        ROW_WORDS);
    }
    if constexpr (F::BLOCKED) {
        for (int64_t i = 0; i < n; i++) {
            uint32_t * row = transposed + i * ROW_WORDS;
            quantize_row_i16<F>((const float *)row, block.rows, F::ROW_LIMIT, (int16_t *)row,
                                scales + i * I16_BLOCKS);
        }
    }
    TileArgs g = {};
    g.ldy = width;
    g.add = true;
    int64_t row = 0;
    for (int64_t i = 0; i < n; i += MR) {
        while (row < block.rows && block.seen[row].last <= k0 + i)
            row++; // rows before key i
        const TileFunction tile = attention_tile<F>(min<int64_t>(MR, n - i));
        for (int64_t c = 0; c < width; c += NR) {
            reduce_over<F>(g, transposed + i * ROW_WORDS, scales + i * I16_BLOCKS,
                           panels + c * steps, row / per * per, block.rows);
            g.y = sums + (k0 + i) * width + c;
            tile(g);
        }
    }
}

/// Pack the block's q and d_o, compute its deltas, clear its dq.
template <class F>
void begin_block(const Backward<F> & b, const ExampleSpan & span, const QueryBlock & block,
                 BlockState & state) {
    const AttentionShape & s = b.s;
    const int64_t rows = block.rows(), token = s.n_head * s.head_size;
    const int64_t at = (block.first * s.n_head + block.head) * s.head_size;
    const HeadRows q = {b.q + at, token, block.heads, s.head_size};
    const HeadRows o = {b.o + at, token, block.heads, s.head_size};
    const HeadRows d_o = {b.d_o + at, token, block.heads, s.head_size};
    pack_tile_rows<F>(q, rows, b.words(b.at.q_rows), b.floats(b.at.q_scales));
    pack_tile_rows<F>(d_o, rows, b.words(b.at.o_rows), b.floats(b.at.o_scales));
    pack_depth<F>(q, rows, b.words(b.at.q_depth));
    pack_depth<F>(d_o, rows, b.words(b.at.o_depth));
    state.rows = rows;
    seen_keys(block, b.start, span.first, state.seen);
    for (int64_t r = 0; r < rows; r++) {
        const float *x = o.row(r), *y = d_o.row(r);
        V dots = {};
        int d = 0;
        for (; d + LANES <= s.head_size; d += LANES)
            dots = fma(load(x + d), load(y + d), dots);
        float delta = sum_lanes(dots);
        for (; d < s.head_size; d++)
            delta += x[d] * y[d];
        state.delta[r] = delta;
        const int64_t t = block.first + r / block.heads, h = block.head + r % block.heads;
        state.lse[r] = b.lse[t * s.n_head + h];
    }
    std::memset(b.words(b.at.dq), 0, (size_t)(rows * head_columns(s.head_size)) * 4);
}

/// One query block: against the key blocks it sees, or of those only the thread's own.
template <class F>
void run_block(const Backward<F> & b, const ExampleSpan & span, const QueryBlock & block,
               bool own_queries, int ith, int nth) {
    const AttentionShape & s = b.s;
    const int64_t rows = block.rows(), width = head_columns(s.head_size);
    const int64_t depth = panel_steps<F>(span.last - span.first);
    BlockState state;
    begin_block(b, span, block, state);
    const int64_t last_key = state.seen[rows - 1].last;
    for (int64_t k = state.seen[0].first / BACKWARD_KEYS; k * BACKWARD_KEYS < last_key; k++) {
        const bool own_keys = !span.shared || (int)(k % nth) == ith;
        if (!own_queries && !own_keys)
            continue;
        const int64_t k0 = k * BACKWARD_KEYS;
        const int64_t n = round_up(min(BACKWARD_KEYS, last_key - k0), NR);
        score_tiles(b, state, k0, n);
        gradient_rows<F>(b, state, k0, n);
        if (own_queries)
            add_dq(b, state, depth, k0, n);
        if (!own_keys)
            continue;
        const float *p = b.floats(b.at.p), *ds = b.floats(b.at.ds);
        add_transposed(b, state, p, b.words(b.at.o_depth), k0, n, b.floats(b.at.dv));
        add_transposed(b, state, ds, b.words(b.at.q_depth), k0, n, b.floats(b.at.dk));
    }
    if (!own_queries)
        return;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = block.first + r / block.heads, head = block.head + r % block.heads;
        std::memcpy(b.dq + (token * s.n_head + head) * s.head_size, b.floats(b.at.dq) + r * width,
                    (size_t)s.head_size * 4);
    }
}

template <class F>
void run_span(const Backward<F> & b, const ExampleSpan & span, int ith, int nth) {
    const AttentionShape & s = b.s;
    const int64_t n = span.last - span.first, width = head_columns(s.head_size);
    const int64_t token = s.n_head_kv * s.head_size;
    const int64_t at = span.first * token + span.head_kv * s.head_size;
    const HeadRows k = {b.k + at, token, 1, s.head_size}, v = {b.v + at, token, 1, s.head_size};
    pack_columns<F>(k, n, b.words(b.at.k_columns));
    pack_columns<F>(v, n, b.words(b.at.v_columns));
    pack_depth<F>(k, n, b.words(b.at.k_depth));
    std::memset(b.words(b.at.dk), 0, (size_t)(round_up(n, NR) * width) * 4);
    std::memset(b.words(b.at.dv), 0, (size_t)(round_up(n, NR) * width) * 4);
    const QueryBlocks blocks(s, span);
    for (int64_t i = 0; i < blocks.size(); i++) {
        const bool own = !span.shared || i % nth == ith;
        run_block(b, span, blocks[i], own, ith, nth);
    }
    for (int64_t i = 0; i < n; i++) {
        if (span.shared && (int)(i / BACKWARD_KEYS % nth) != ith)
            continue;
        std::memcpy(b.dk + at + i * token, b.floats(b.at.dk) + i * width, (size_t)s.head_size * 4);
        std::memcpy(b.dv + at + i * token, b.floats(b.at.dv) + i * width, (size_t)s.head_size * 4);
    }
}

} // namespace

void attention_backward(Format format, const AttentionShape & s, const float * q, const float * k,
                        const float * v, const int32_t * start, const float * o, const float * lse,
                        const float * d_o, float * dq, float * dk, float * dv, int ith, int nth) {
    with_attention_format(format, [&](auto f) {
        using F = decltype(f);
        const Layout<F> at(s);
        uint32_t * memory = thread_words((size_t)at.end);
        const Backward<F> b = {s, q, k, v, start, o, lse, d_o, dq, dk, dv, at, memory};
        for (const ExampleSpan & span : Spans(s, start, ith, nth))
            run_span(b, span, ith, nth);
    });
}

size_t attention_backward_scratch_bytes(Format format, const AttentionShape & s) {
    return with_attention_format(format,
                                 [&](auto f) { return (size_t)Layout<decltype(f)>(s).end * 4; });
}

} // namespace ggft::GGFT_ISA_NAMESPACE
