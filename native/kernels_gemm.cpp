#include "kernels_gemm.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernels_dropout.h"
#include "kernels_micro.h"
#include "kernels_pack.h"

namespace ggft {
namespace {

// Panels that are in the L2 cache together: 768 KB; 512 KB where L2 caches are small.
#if defined(GGFT_AVX512) || defined(__aarch64__)
constexpr int64_t GROUP_WORDS = 192 << 10;
#else
constexpr int64_t GROUP_WORDS = 128 << 10;
#endif
constexpr int64_t round_up(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

struct FreeDeleter {
    void operator()(void * p) const { std::free(p); }
};

/// Working memory of one thread.
struct Scratch {
    std::unique_ptr<uint32_t, FreeDeleter> memory;
    uint32_t * panels;
    uint32_t * rows;
    float * spill; // [MR][NR], a tile at the right edge
    float * keep;  // [MR][NR], dropout factors
    std::vector<float> low_panels;

    Scratch() {
        const size_t words = GROUP_WORDS + MR * TILE_STRIDE + 2 * round_up(MR * NR, 16);
        memory.reset((uint32_t *)std::aligned_alloc(64, round_up(words * 4, 64)));
        if (!memory)
            throw std::bad_alloc();
        panels = memory.get();
        rows = panels + GROUP_WORDS;
        spill = (float *)rows + MR * TILE_STRIDE;
        keep = spill + round_up(MR * NR, 16);
    }
};

/// A product out = x * panels, in one direction.
struct Product {
    bool bf16, nt;
    const Weight & w;
    Rows x;
    const LowRank * low;
    Output y;
    int64_t n_tokens, n_cols, depth; // n_cols: of the output; depth: of the reduction

    int64_t block() const { return ggml_blck_size(w.type); }
    int64_t column_unit() const { return nt ? NR : std::max<int64_t>(NR, block()); }
    int64_t depth_unit() const { return nt ? std::max<int64_t>(32, block()) : 32; }
    int64_t max_depth() const { return MAX_STEPS * per_word(bf16); }
    int64_t packed_steps() const { return (depth + per_word(bf16) - 1) / per_word(bf16); }
};

/// Tokens and columns of thread `ith`: as many column ranges as threads, unless columns are so few
/// that splitting tokens, too, shortens the longest thread's work (dequantizing counts as
/// `unpack_tokens` tokens).
void choose_part(const Product & p, int ith, int nth, Range & tokens, Range & columns) {
    const int64_t unpack_tokens = 24;
    const int64_t tiles = (p.n_tokens + MR - 1) / MR;
    const int64_t units = (p.n_cols + p.column_unit() - 1) / p.column_unit();
    int best = 1;
    int64_t best_cost = INT64_MAX;
    for (int by_tokens = 1; by_tokens <= nth; by_tokens++) {
        if (nth % by_tokens)
            continue;
        const int64_t by_columns = nth / by_tokens;
        const int64_t cost = ((units + by_columns - 1) / by_columns) *
                             ((tiles + by_tokens - 1) / by_tokens * MR + unpack_tokens);
        if (cost < best_cost) {
            best = by_tokens;
            best_cost = cost;
        }
    }
    tokens = split_range(p.n_tokens, MR, ith % best, best);
    columns = split_range(p.n_cols, p.column_unit(), ith / best, nth / best);
}

/// scale * right for columns [c0, c0+nc) as panels [nc/NR][rank][NR].
void pack_low_rank(const Product & p, int64_t c0, int64_t nc, std::vector<float> & out) {
    const LowRank & low = *p.low;
    out.assign((size_t)(round_up(nc, NR) * low.rank), 0.0f);
    for (int64_t c = 0; c < std::min(nc, p.n_cols - c0); c++) {
        float * panel = out.data() + c / NR * low.rank * NR + c % NR;
        const float * right = p.nt ? low.right + (c0 + c) * low.rank : low.right + c0 + c;
        const int64_t step = p.nt ? 1 : p.n_cols;
        for (int r = 0; r < low.rank; r++)
            panel[r * NR] = low.scale * right[r * step];
    }
}

void fill_keep(const LowRank & low, int64_t t0, int rows, int64_t column, float * keep) {
    const int32_t threshold = dropout_threshold(low.dropout);
    const V kept = splat(1.0f / (1.0f - low.dropout));
    for (int i = 0; i < rows; i++) {
        const uint32_t key = dropout_row_key(low.seed, t0 + i);
        for (int j = 0; j < NR; j += LANES) {
            store(keep + i * NR + j, dropout_factors(key, column + j, threshold, kept));
        }
    }
}

/// Ask for a share of the next row tile of x, so that it arrives while this one is at work.
void prefetch_rows(const Rows & x, const Range & rows, int64_t k0, int64_t kc, int64_t share,
                   int64_t shares) {
    const int64_t size = x.is_bf16 ? 2 : 4, lines = (kc * size + 63) / 64;
    const Range part = split_range((rows.last - rows.first) * lines, 1, (int)share, (int)shares);
    int64_t row = rows.first + part.first / lines, line = part.first % lines;
    for (int64_t i = part.first; i < part.last; i++) {
        __builtin_prefetch((const char *)x.data + (row * x.stride + k0) * size + line * 64);
        if (++line == lines) {
            line = 0;
            row++;
        }
    }
}

void prefetch_output(const float * y, int64_t stride, int rows) {
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j < NR; j += 16)
            __builtin_prefetch(y + i * stride + j, 1);
    }
}

/// A row tile and the block of panels that it runs past.
struct TileJob {
    const uint32_t * panels;
    int64_t panel_steps;
    Range columns, tokens, next_tokens;
    int64_t k0, kc;
};

void run_tile(const Product & p, Scratch & s, const TileJob & job) {
    const int64_t t0 = job.tokens.first, c0 = job.columns.first;
    const int64_t nc = job.columns.last - c0, panels = (nc + NR - 1) / NR;
    const int rows = (int)(job.tokens.last - t0);
    const TileFunction tile = tile_function(p.bf16, rows);
    const int rank = job.k0 == 0 && p.low ? p.low->rank : 0;
    const bool add = p.y.add || job.k0 > 0;
    for (int64_t c = 0; c < nc; c += NR) {
        TileArgs g = {};
        g.rows = s.rows;
        g.panel = job.panels + c * job.panel_steps;
        g.steps = (int)((job.kc + per_word(p.bf16) - 1) / per_word(p.bf16));
        if (rank) {
            g.low_rows = p.low->left + t0 * p.low->left_stride;
            g.low_stride = p.low->left_stride;
            g.low_panel = s.low_panels.data() + c * rank;
            g.low_steps = rank;
            if (!p.nt && p.low->dropout > 0.0f) {
                fill_keep(*p.low, t0, rows, c0 + c, s.keep);
                g.keep = s.keep;
            }
        }
        float * y = p.y.data + t0 * p.y.stride + c0 + c;
        const int64_t width = std::min<int64_t>(NR, p.n_cols - c0 - c);
        prefetch_rows(p.x, job.next_tokens, job.k0, job.kc, c / NR, panels);
        if (c + NR < nc)
            prefetch_output(y + NR, p.y.stride, rows);
        g.y = width < NR ? s.spill : y;
        g.ldy = width < NR ? NR : p.y.stride;
        g.add = width < NR ? false : add;
        tile(g);
        if (width == NR)
            continue;
        for (int i = 0; i < rows; i++) {
            float * to = y + i * p.y.stride;
            const float * from = s.spill + i * NR;
            for (int64_t j = 0; j < width; j++)
                to[j] = add ? to[j] + from[j] : from[j];
        }
    }
}

/// The i-th of `tiles` parts of [tokens.first, tokens.last), as even as can be.
Range tile_tokens(const Range & tokens, int64_t i, int64_t tiles) {
    const Range part = split_range(tokens.last - tokens.first, 1, (int)i, (int)tiles);
    return {tokens.first + part.first, tokens.first + part.last};
}

void run_product(const Product & p, int ith, int nth) {
    static thread_local Scratch scratch;
    Range tokens, columns;
    choose_part(p, ith, nth, tokens, columns);
    if (tokens.first >= tokens.last)
        return;
    const int64_t blocks = (p.depth + p.max_depth() - 1) / p.max_depth();
    const int64_t kc_full = round_up((p.depth + blocks - 1) / blocks, p.depth_unit());
    const int64_t tiles = (tokens.last - tokens.first + MR - 1) / MR;
    const int64_t width = columns.last - columns.first;
    const int64_t steps_full = (kc_full + per_word(p.bf16) - 1) / per_word(p.bf16);
    const int64_t most = GROUP_WORDS / steps_full / p.column_unit() * p.column_unit();
    const int64_t groups = (width + most - 1) / most;
    for (int64_t group = 0; group < groups; group++) { // of even size, so that none is tiny
        const Range part = split_range(width, p.column_unit(), (int)group, (int)groups);
        const int64_t c0 = columns.first + part.first, nc = part.last - part.first;
        if (p.low)
            pack_low_rank(p, c0, nc, scratch.low_panels);
        for (int64_t k0 = 0; k0 < p.depth; k0 += kc_full) {
            const int64_t kc = std::min(kc_full, p.depth - k0);
            const int64_t steps = (kc + per_word(p.bf16) - 1) / per_word(p.bf16);
            const uint32_t * panels = scratch.panels;
            int64_t panel_steps = steps;
            if (p.w.packed) {
                panel_steps = p.packed_steps();
                panels =
                    (const uint32_t *)p.w.packed + c0 * panel_steps + k0 / per_word(p.bf16) * NR;
            } else if (p.nt) {
                pack_panels_nt(p.bf16, p.w, c0, nc, k0, kc, steps, scratch.panels);
            } else {
                pack_panels_nn(p.bf16, p.w, c0, nc, k0, kc, steps, scratch.panels);
            }
            for (int64_t i = 0; i < tiles; i++) {
                const Range now = tile_tokens(tokens, i, tiles);
                const Range next = i + 1 < tiles ? tile_tokens(tokens, i + 1, tiles) : Range{0, 0};
                pack_rows(p.bf16, p.x, now.first, (int)(now.last - now.first), k0, kc,
                          scratch.rows);
                run_tile(p, scratch, {panels, panel_steps, {c0, c0 + nc}, now, next, k0, kc});
            }
        }
    }
}

size_t packed_bytes(bool bf16, int64_t n_columns, int64_t depth) {
    const int64_t steps = (depth + per_word(bf16) - 1) / per_word(bf16);
    return (size_t)(round_up(n_columns, NR) * steps) * 4;
}

bool use_bf16(Precision precision) {
    return HAS_BF16 && precision == Precision::bf16;
}

} // namespace

bool has_bf16_dot() {
    return HAS_BF16;
}

void matmul_nt(Precision precision, const Weight & w, Rows x, const LowRank * low_rank, Output y,
               int64_t n_tokens, int ith, int nth) {
    run_product({use_bf16(precision), true, w, x, low_rank, y, n_tokens, w.n_rows, w.n_cols}, ith,
                nth);
}

void matmul_nn(Precision precision, const Weight & w, Rows dy, const LowRank * low_rank, Output dx,
               int64_t n_tokens, int ith, int nth) {
    run_product({use_bf16(precision), false, w, dy, low_rank, dx, n_tokens, w.n_cols, w.n_rows},
                ith, nth);
}

size_t packed_nt_bytes(Precision precision, int64_t n_rows, int64_t n_cols) {
    return packed_bytes(use_bf16(precision), n_rows, n_cols);
}
size_t packed_nn_bytes(Precision precision, int64_t n_rows, int64_t n_cols) {
    return packed_bytes(use_bf16(precision), n_cols, n_rows);
}

void pack_nt(Precision precision, const Weight & w, void * out, int ith, int nth) {
    const bool bf16 = use_bf16(precision);
    const int64_t steps = (w.n_cols + per_word(bf16) - 1) / per_word(bf16);
    const Range part = split_range(w.n_rows, NR, ith, nth);
    pack_panels_nt(bf16, w, part.first, part.last - part.first, 0, w.n_cols, steps,
                   (uint32_t *)out + part.first * steps);
}

void pack_nn(Precision precision, const Weight & w, void * out, int ith, int nth) {
    const bool bf16 = use_bf16(precision);
    const int64_t steps = (w.n_rows + per_word(bf16) - 1) / per_word(bf16);
    const int64_t unit = std::max<int64_t>(NR, ggml_blck_size(w.type));
    const Range part = split_range(w.n_cols, unit, ith, nth);
    pack_panels_nn(bf16, w, part.first, part.last - part.first, 0, w.n_rows, steps,
                   (uint32_t *)out + part.first * steps);
}

void convert_bf16(const float * x, int64_t x_stride, uint16_t * out, int64_t out_stride,
                  int64_t n_cols, int64_t n_tokens, int ith, int nth) {
    const Range part = split_range(n_tokens, 1, ith, nth);
    for (int64_t t = part.first; t < part.last; t++) {
        const float * from = x + t * x_stride;
        uint16_t * to = out + t * out_stride;
        int64_t c = 0;
        for (; c + LANES <= n_cols; c += LANES)
            store_bf16(to + c, load(from + c));
        for (; c < n_cols; c++)
            to[c] = to_bf16(from[c]);
    }
}

} // namespace ggft
