#include <algorithm>

#include "kernels/attention/attention.h"
#include "kernels/attention/tiles.h"
#include "kernels/isa/memory.h"

// For every block of query rows and every block of keys it sees, with everything in L2:
//
//   S = q k', dP = d_o v'         one register tile each
//   p = e^(scale*S - lse), dS = p * (dP - delta) * scale
//   dq += dS k                    rows of dS against k
//   dv += p' d_o, dk += dS' q     p and dS transposed, then rows of them against d_o and q
//
// dk and dv gather in buffers of the thread. On a unit that all threads share, each owns some query
// blocks (for dq) and some key blocks (for dk and dv), and computes the tiles that either needs.

namespace ggft {

using namespace attention_detail;

namespace {

constexpr int64_t BLOCK_KEYS = 64; // scores of a block, and their gradients: 24 KB each

/// Where a thread's working memory holds what, in words.
struct Layout {
    int64_t k_columns, v_columns, k_depth, q_rows, q_scales, o_rows, o_scales, q_depth, o_depth, p,
        ds, ds_rows, ds_scales, transposed, transposed_scales, dq, dk, dv, end = 0;
    int64_t take(int64_t words) {
        const int64_t at = end;
        end += round_up(words, 16);
        return at;
    }
    Layout(Format format, const AttentionShape & s) {
        const int64_t steps = panel_steps(format, s.head_size), width = head_columns(s.head_size);
        const int64_t n = round_up(s.n_tokens, NR);
        k_columns = take(n * steps);
        v_columns = take(n * steps);
        k_depth = take(width * panel_steps(format, n));
        q_rows = take(ROWS * STRIDE);
        q_scales = take(ROWS * I16_BLOCKS);
        o_rows = take(ROWS * STRIDE);
        o_scales = take(ROWS * I16_BLOCKS);
        q_depth = take(width * panel_steps(format, ROWS));
        o_depth = take(width * panel_steps(format, ROWS));
        p = take(ROWS * BLOCK_KEYS);
        ds = take(ROWS * BLOCK_KEYS);
        ds_rows = take(ROWS * STRIDE);
        ds_scales = take(ROWS * I16_BLOCKS);
        transposed = take(BLOCK_KEYS * STRIDE);
        transposed_scales = take(BLOCK_KEYS * I16_BLOCKS);
        dq = take(ROWS * width);
        dk = take(n * width);
        dv = take(n * width);
    }
};

struct Backward {
    Format format;
    const AttentionShape & s;
    const float *q, *k, *v;
    const int32_t * start;
    const float *o, *lse, *d_o;
    float *dq, *dk, *dv;
    Layout at;
    uint32_t * memory;

    uint32_t * words(int64_t offset) const { return memory + offset; }
    float * floats(int64_t offset) const { return (float *)(memory + offset); }
};

/// One query block at work.
struct BlockState {
    int64_t rows;
    Range seen[ROWS]; // keys that each row sees
    float lse[ROWS], delta[ROWS];
};

/// S and dP of all rows for keys [k0, k0+n); undefined where a row tile sees nothing of a panel.
void score_tiles(const Backward & b, const BlockState & block, int64_t k0, int64_t n) {
    TileArgs g = {};
    const int64_t steps = panel_steps(b.format, b.s.head_size);
    g.ldy = BLOCK_KEYS;
    const auto run = [&](TileFunction tile, int64_t rows, int64_t scales, int64_t columns,
                         int64_t y, int64_t r, int64_t c) {
        reduce_over(b.format, g, b.words(rows) + r * STRIDE, b.floats(scales) + r * I16_BLOCKS,
                    b.words(columns) + (k0 + c) * steps, 0, b.s.head_size);
        g.y = b.floats(y) + r * BLOCK_KEYS + c;
        tile(g);
    };
    for (int64_t r = 0; r < block.rows; r += MR) {
        const int n_rows = (int)std::min<int64_t>(MR, block.rows - r);
        const TileFunction tile = tile_of_format<Format::i16_even, STRIDE>(b.format, n_rows);
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
GGFT_INLINE void gradient_lanes(const Backward & b, const BlockState & block, int64_t r, int64_t k0,
                                int64_t c, V & p, V & ds) {
    const int64_t at = r * BLOCK_KEYS + c;
    const Range seen = block.seen[r];
    p = ds = V{};
    if (k0 + c >= seen.last || k0 + c + LANES <= seen.first)
        return;
    p = vexp(fma(load(b.floats(b.at.p) + at), splat(b.s.scale), splat(-block.lse[r])));
    ds = p * (load(b.floats(b.at.ds) + at) - splat(block.delta[r])) * b.s.scale;
    if (k0 + c >= seen.first && k0 + c + LANES <= seen.last)
        return;
    VI index;
    for (int i = 0; i < LANES; i++)
        index[i] = (int32_t)(k0 + c) + i;
    const VI mask = (index >= (int32_t)seen.first) & (index < (int32_t)seen.last);
    p = select(mask, p, V{});
    ds = select(mask, ds, V{});
}

/// All rows for n keys. F32 and 16-bit integers: p and dS replace scores and dP. BF16: rows 2i and
/// 2i+1 become words of row i. dS is also written as tile rows.
template <Format FORMAT>
void gradient_rows(const Backward & b, const BlockState & block, int64_t k0, int64_t n) {
    constexpr bool BF16 = FORMAT == Format::bf16;
    constexpr int64_t PER = BF16 ? 2 : 1;
    for (int64_t i = 0; i < round_up(block.rows, PER * LANES) / PER; i++) {
        float * p_out = b.floats(b.at.p) + i * BLOCK_KEYS;
        float * ds_out = b.floats(b.at.ds) + i * BLOCK_KEYS;
        for (int64_t c = 0; c < n; c += LANES) {
            V p[PER] = {}, ds[PER] = {};
            for (int64_t j = 0; j < PER && i * PER + j < block.rows; j++) {
                const int64_t r = i * PER + j;
                gradient_lanes(b, block, r, k0, c, p[j], ds[j]);
                uint32_t * row = b.words(b.at.ds_rows) + r * STRIDE;
                if (BF16) {
                    store_bf16((uint16_t *)row + c, ds[j]);
                } else if (FORMAT == Format::f32) {
                    store((float *)row + c, ds[j]);
                }
            }
            store(p_out + c, BF16 ? (V)pair_bf16(p[0], p[PER - 1]) : p[0]);
            store(ds_out + c, BF16 ? (V)pair_bf16(ds[0], ds[PER - 1]) : ds[0]);
        }
#if defined(GGFT_I16)
        if (FORMAT == Format::i16_even && i < block.rows) {
            quantize_row_i16<Format::i16_even>(ds_out, n, I16_LIMIT,
                                               (int16_t *)(b.words(b.at.ds_rows) + i * STRIDE),
                                               b.floats(b.at.ds_scales) + i * I16_BLOCKS);
        }
#endif
    }
}

void gradient_rows(const Backward & b, const BlockState & block, int64_t k0, int64_t n) {
    switch (b.format) {
    case Format::bf16:
        return gradient_rows<Format::bf16>(b, block, k0, n);
    case Format::i16_even:
        return gradient_rows<Format::i16_even>(b, block, k0, n);
    default:
        return gradient_rows<Format::f32>(b, block, k0, n);
    }
}

/// dq += dS k for the block's rows and keys [k0, k0+n).
void add_dq(const Backward & b, const BlockState & block, int64_t depth, int64_t k0, int64_t n) {
    const int64_t width = head_columns(b.s.head_size);
    const uint32_t * panels = b.words(b.at.k_depth) + panel_steps(b.format, k0) * NR;
    TileArgs g = {};
    g.ldy = width;
    g.add = true;
    for (int64_t r = 0; r < block.rows; r += MR) {
        const int n_rows = (int)std::min<int64_t>(MR, block.rows - r);
        const int64_t keys = std::min(n, block.seen[r + n_rows - 1].last - k0);
        if (keys <= 0)
            continue;
        const TileFunction tile = tile_of_format<Format::i16_even, STRIDE>(b.format, n_rows);
        for (int64_t c = 0; c < width; c += NR) {
            reduce_over(b.format, g, b.words(b.at.ds_rows) + r * STRIDE,
                        b.floats(b.at.ds_scales) + r * I16_BLOCKS, panels + c * depth, 0, keys);
            g.y = b.floats(b.at.dq) + r * width + c;
            tile(g);
        }
    }
}

/// sums += x' panels for keys [k0, k0+n): x is p or dS, panels are d_o or q by depth.
void add_transposed(const Backward & b, const BlockState & block, const float * x,
                    const uint32_t * panels, int64_t k0, int64_t n, float * sums) {
    const int64_t per = per_word(b.format), width = head_columns(b.s.head_size);
    const int64_t steps = panel_steps(b.format, block.rows);
    // Rows of x that are transposed as they are: floats, or words of two.
    const int64_t x_rows = b.format == Format::bf16 ? (block.rows + 1) / 2 : block.rows;
    uint32_t * transposed = b.words(b.at.transposed);
    float * scales = b.floats(b.at.transposed_scales);
    for (int64_t r = 0; r < x_rows; r += LANES) {
        transpose_words((const uint32_t *)x + r * BLOCK_KEYS, BLOCK_KEYS, n, transposed + r,
                        STRIDE);
    }
#if defined(GGFT_I16)
    for (int64_t i = 0; b.format == Format::i16_even && i < n; i++) {
        uint32_t * row = transposed + i * STRIDE;
        quantize_row_i16<Format::i16_even>((const float *)row, block.rows, I16_LIMIT,
                                           (int16_t *)row, scales + i * I16_BLOCKS);
    }
#endif
    TileArgs g = {};
    g.ldy = width;
    g.add = true;
    int64_t row = 0;
    for (int64_t i = 0; i < n; i += MR) {
        while (row < block.rows && block.seen[row].last <= k0 + i)
            row++; // rows before key i
        const TileFunction tile =
            tile_of_format<Format::i16_even, STRIDE>(b.format, (int)std::min<int64_t>(MR, n - i));
        for (int64_t c = 0; c < width; c += NR) {
            reduce_over(b.format, g, transposed + i * STRIDE, scales + i * I16_BLOCKS,
                        panels + c * steps, row / per * per, block.rows);
            g.y = sums + (k0 + i) * width + c;
            tile(g);
        }
    }
}

/// Pack the block's q and d_o, compute its deltas, clear its dq.
void begin_block(const Backward & b, const Unit & unit, const QueryBlock & block,
                 BlockState & state) {
    const AttentionShape & s = b.s;
    const int64_t rows = block.rows(), token = s.n_head * s.head_size;
    const int64_t at = (block.first * s.n_head + block.head) * s.head_size;
    const HeadRows q = {b.q + at, token, block.heads, s.head_size};
    const HeadRows o = {b.o + at, token, block.heads, s.head_size};
    const HeadRows d_o = {b.d_o + at, token, block.heads, s.head_size};
    pack_tile_rows(b.format, q, rows, b.words(b.at.q_rows), b.floats(b.at.q_scales));
    pack_tile_rows(b.format, d_o, rows, b.words(b.at.o_rows), b.floats(b.at.o_scales));
    pack_depth(b.format, q, rows, b.words(b.at.q_depth));
    pack_depth(b.format, d_o, rows, b.words(b.at.o_depth));
    state.rows = rows;
    seen_keys(block, b.start, unit.first, state.seen);
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
void run_block(const Backward & b, const Unit & unit, const QueryBlock & block, bool own_queries,
               int ith, int nth) {
    const AttentionShape & s = b.s;
    const int64_t rows = block.rows(), width = head_columns(s.head_size);
    const int64_t depth = panel_steps(b.format, unit.last - unit.first);
    BlockState state;
    begin_block(b, unit, block, state);
    const int64_t last_key = state.seen[rows - 1].last;
    for (int64_t k = state.seen[0].first / BLOCK_KEYS; k * BLOCK_KEYS < last_key; k++) {
        const bool own_keys = !unit.shared || (int)(k % nth) == ith;
        if (!own_queries && !own_keys)
            continue;
        const int64_t k0 = k * BLOCK_KEYS;
        const int64_t n = round_up(std::min(BLOCK_KEYS, last_key - k0), NR);
        score_tiles(b, state, k0, n);
        gradient_rows(b, state, k0, n);
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

void run_unit(const Backward & b, const Unit & unit, int ith, int nth) {
    const AttentionShape & s = b.s;
    const int64_t n = unit.last - unit.first, width = head_columns(s.head_size);
    const int64_t token = s.n_head_kv * s.head_size;
    const int64_t at = unit.first * token + unit.head_kv * s.head_size;
    const HeadRows k = {b.k + at, token, 1, s.head_size}, v = {b.v + at, token, 1, s.head_size};
    pack_columns(b.format, k, n, b.words(b.at.k_columns));
    pack_columns(b.format, v, n, b.words(b.at.v_columns));
    pack_depth(b.format, k, n, b.words(b.at.k_depth));
    std::memset(b.words(b.at.dk), 0, (size_t)(round_up(n, NR) * width) * 4);
    std::memset(b.words(b.at.dv), 0, (size_t)(round_up(n, NR) * width) * 4);
    const std::vector<QueryBlock> blocks = query_blocks(s, unit);
    for (size_t i = 0; i < blocks.size(); i++) {
        const bool own = !unit.shared || (int)(i % (size_t)nth) == ith;
        run_block(b, unit, blocks[i], own, ith, nth);
    }
    for (int64_t i = 0; i < n; i++) {
        if (unit.shared && (int)(i / BLOCK_KEYS % nth) != ith)
            continue;
        std::memcpy(b.dk + at + i * token, b.floats(b.at.dk) + i * width, (size_t)s.head_size * 4);
        std::memcpy(b.dv + at + i * token, b.floats(b.at.dv) + i * width, (size_t)s.head_size * 4);
    }
}

} // namespace

void attention_backward(Precision precision, const AttentionShape & s, const float * q,
                        const float * k, const float * v, const int32_t * start, const float * o,
                        const float * lse, const float * d_o, float * dq, float * dk, float * dv,
                        int ith, int nth) {
    const Format format = attention_format(precision);
    const Layout at(format, s);
    const Backward b = {format, s,   q,  k,  v,  start, o,
                        lse,    d_o, dq, dk, dv, at,    thread_words((size_t)at.end)};
    for (const Unit & unit : plan_units(s, start, ith, nth))
        run_unit(b, unit, ith, nth);
}

size_t attention_backward_scratch_bytes(Precision precision, const AttentionShape & shape) {
    return (size_t)Layout(attention_format(precision), shape).end * 4;
}

} // namespace ggft
